"""What is read off each step: gradients, updates, logits, attention; and the predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Item, Text, charts, gaps
from dyndiag.reports.contents import Contents, clipped_share


def gradients(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    items: list[Item] = charts([figures.gradient_norm(c)])
    items += _clipping(c)
    items += charts(
        [
            figures.heat(c, "gradients/norm/", "Gradient norm by layer", "L2", "layers"),
            figures.plain_line(
                c, "updates/ratio", "Update over weight", "‖Δθ‖ / ‖θ‖", "update over weight",
                id="updates", height=120, says="How far each step moves the weights.",
            ),
            figures.heat(
                c, "updates/ratio/", "Update over weight by layer", "‖Δθ‖ / ‖θ‖", "update-layers"
            ),
        ]
    )  # fmt: skip
    items += gaps(absent, ("gradients", "updates"))
    empty = "gradients" in absent and "updates" in absent
    return Chapter("gradients", "Gradients by layer", "Gradients", "", tuple(items), empty)


def _clipping(c: Contents) -> list[Item]:
    share = clipped_share(c, c.first, c.last)
    if share is None:
        return []
    return [Text(f"Clipping cut the gradient at {words.percent(share)} of the steps.")]


def logits(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    items: list[Item] = charts([figures.attention(c), figures.logits(c)])
    prefix, modules = figures.attention_names(c)
    if prefix.endswith("sampled/"):
        items.append(Text("An eighth of the sequences was looked at: lower bounds of the batch's."))
    lead = ""
    if modules:
        peaks = {m: float(np.nanmax(c.series[prefix + m].values)) for m in modules}
        worst = max(peaks, key=lambda m: peaks[m])
        lead = f"The largest attention logit was {words.number(peaks[worst])}, in {worst}."
    items += gaps(absent, ("attention", "logits"))
    empty = "attention" in absent and "logits" in absent
    return Chapter("logits", "Logits and attention", "Logits, attention", lead, tuple(items), empty)


def predictions(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    items: list[Item] = charts([figures.entropy(c), figures.divergence(c), figures.instability(c)])
    empty = "predictions" in absent
    if empty:
        items.append(absent["predictions"])
    lead = (
        ""
        if empty
        else "How sure the model is on the probe batch, and how fast its answers change."
    )
    return Chapter("predictions", "Predictions", "Predictions", lead, tuple(items), empty)
