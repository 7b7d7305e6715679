"""In warm-up a step raised the loss of its own batch."""

from __future__ import annotations

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import (
    Finding,
    Source,
    Told,
    around,
    end_of,
    evidence,
    span,
    surety,
    value,
)

KALRA = Source(
    "Kalra, Barkeshli",
    "Why warmup the learning rate? Underlying mechanisms and improvements",
    2024,
    "https://arxiv.org/abs/2406.09405",
)


def early_overshoot(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    word, dots = surety(event)
    window = around(c, event.start, end, share=1.0)
    most = value(event, "peak_value", event.severity)
    at = f"at step {words.steps(event.start)}"
    return Finding(
        event=event,
        urgency="know",
        title=f"A step of the warm-up raised the loss of its own batch {at}",
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=f"the realised edge, exact for its batch, reached {words.number(most)} (above 1 a "
        "step raises the loss).",
        what="The rate was already too long for the curvature at that point. The edge ratio cannot "
        "say so this early, because the optimizer's moments are still settling.",
        people=(
            "Nothing, if the loss came down afterwards.",
            "Lengthen the warm-up, or start it lower.",
        ),
        sources=(KALRA,),
        figures=evidence(
            figures.plain_line(
                c, "stability/realised_edge", "Realised edge", "ζ; above 1 a step raised the loss",
                "realised edge", id=f"overshoot-{event.start}", height=110, cls="s1", log=False,
                window=window,
            ),
            figures.loss(c, f"overshoot-{event.start}-loss", 100, window),
        ),
        window=window,
        chapter="stability",
        sentence=f"Steps in the warm-up raised the loss of their own batch from step "
        f"{words.steps(event.start)} on."
        if event.end is None
        else f"A step in the warm-up, {at}, raised the loss of its own batch.",
        numbers=f"The realised edge reached {words.number(most)}; above 1 a step raises the loss.",
        label=f"Early overshoot {words.number(most, 2)}",
        short="Overshoot",
    )  # fmt: skip
