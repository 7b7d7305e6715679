"""An event of a kind that the report has no words for."""

from __future__ import annotations

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import (
    Finding,
    Told,
    around,
    details_text,
    end_of,
    evidence,
    safe,
    span,
    surety,
)


def other(told: Told, c: Contents) -> Finding:
    event = told.event
    kind = safe(event.kind.replace("_", " "))
    sure, dots = surety(event)
    window = around(c, event.start, end_of(c, event))
    return Finding(
        event=event,
        urgency="know",
        title=f"{words.capital(kind)} at step {words.steps(event.start)}",
        when=span(c, event),
        sure=sure,
        dots=dots,
        reason=f"the detector's confidence is {words.number(event.confidence, 2)}.",
        what=f"{words.capital(details_text(event.details))}." if event.details else "",
        people=(),
        sources=(),
        figures=evidence(figures.loss(c, f"f{event.start}-other", 120, window)),
        window=window,
        chapter="stability",
        sentence=f"An event of kind {kind} began at step {words.steps(event.start)}.",
        numbers="",
        label=words.capital(kind),
        short=words.capital(kind),
    )
