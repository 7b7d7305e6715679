"""What had moved before the loss jumped."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents, Series
from dyndiag.reports.findings.finding import judged, text
from dyndiag.values import Event

BEFORE = 50  # steps in which a precursor is looked for


def precursor(c: Contents, event: Event) -> str:
    """What had moved in the 50 steps before, as words; empty if nothing measured had.

    Attention logits above 1,000 that had grown threefold since the run's first tenth; an edge ratio
    above 1.2 that had been below 1 before (at the edge it hovers near 1 and tells nothing); a
    gradient norm that in the steps before (not the spike's own) stood four times above its median
    of 200.
    """
    if text(event, "in_doubt") == "task switch":
        return "task switch"
    first = event.start - BEFORE
    found = worst_block(c, event)
    if found is not None:
        name, _, series = found
        early = series.within(c.first, c.first + max(20, (event.start - c.first) // 10))
        top = np.nanmax(series.within(first, event.start - 1))
        if top >= figures.LOGITS and (not len(early) or top >= 3 * np.nanmedian(early)):
            return f"attention logits in {name}"
    if edge_passed(c, event):
        return "the edge ratio had passed 1"
    norm = c.series.get("gradients/norm")
    if norm is not None:
        usual = norm.within(first - 200, first - 1)
        recent = norm.within(event.start - 10, event.start - 1)
        usual, recent = usual[np.isfinite(usual)], recent[np.isfinite(recent)]
        if len(usual) >= 20 and len(recent) and recent.max() > 4 * np.median(usual):
            ratio = recent.max() / np.median(usual)
            return f"the gradient norm had stood {words.number(ratio, 2)} times above its median"
    return ""


def edge_passed(c: Contents, event: Event) -> float:
    """The highest edge ratio of the 50 steps before, if that is a precursor; else 0."""
    recent = judged(c, "stability/edge_ratio", event.start - BEFORE, event.start - 1)
    earlier = judged(c, "stability/edge_ratio", c.first, event.start - BEFORE - 1)
    top = float(recent.max()) if len(recent) else 0.0
    return top if top > 1.2 and len(earlier) and float(earlier.min()) < 1 else 0.0


def worst_block(c: Contents, event: Event) -> tuple[str, float, Series] | None:
    """The block with the largest attention logit in the 50 steps before: name, value, series."""
    prefix, modules = figures.attention_names(c)
    best: tuple[str, float, Series] | None = None
    for module in modules:
        series = c.series[prefix + module]
        values = series.within(event.start - BEFORE, event.start - 1)
        values = values[np.isfinite(values)]
        if len(values) and (best is None or values.max() > best[1]):
            best = (module, float(values.max()), series)
    return best


def same_batch(c: Contents) -> bool:
    """Whether every step was taken on the probe batch: then no bad batch explains a jump."""
    flags = c.series.get("stability/full_batch")
    return flags is not None and len(flags.values) > 0 and bool(np.all(flags.values == 1))
