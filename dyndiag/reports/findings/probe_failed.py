"""A probe failed: its values are missing, the training went on."""

from __future__ import annotations

from collections.abc import Mapping

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import Finding, Told, around, end_of, safe, span, surety

SAID = " Training goes on; the values it would have given are missing."  # said by the finding too


def probe_failed(told: Told, c: Contents) -> Finding:
    event = told.event
    probe = _probe(told)
    sure, dots = surety(event)
    failures = c.series.get(f"failures/{probe}")
    many = len(failures) if failures is not None else 1
    window = around(c, event.start, end_of(c, event))
    message = _message(c, probe)
    return Finding(
        event=event,
        urgency="know",
        title=f"The probe {safe(probe)} failed {words.count(many, 'time')}",
        when=span(c, event),
        sure=sure,
        dots=dots,
        reason="the failure itself was recorded; nothing is estimated.",
        what=(f"{safe(message, 300)} " if message else "")
        + "Its values are missing at those steps; the training was not touched.",
        people=(
            "Nothing for the training itself.",
            "Read the message; the rest of the report stands.",
        ),
        sources=(),
        figures=(),
        window=window,
        chapter="missing",
        sentence=f"The probe {safe(probe)} failed at step {words.steps(event.start)}; "
        "what it measures is missing from there on."
        if event.end is None
        else f"The probe {safe(probe)} failed {words.count(many, 'time')}.",
        numbers="",
        label=f"{safe(probe, 24)} failed",
        short="Failed",
    )


def _probe(told: Told) -> str:
    for name in told.event.series:
        if name.startswith("failures/"):
            return name.removeprefix("failures/")
    return str(told.event.details.get("probe") or "?")


def _message(c: Contents, probe: str) -> str:
    for notice in c.metadata.get("notices") or ():
        if isinstance(notice, Mapping) and notice.get("source") == probe:
            return str(notice.get("text") or "").removesuffix(SAID)
    return ""
