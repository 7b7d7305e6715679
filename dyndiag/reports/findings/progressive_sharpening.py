"""Sharpness grew steadily below its threshold."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import (
    COHEN,
    Finding,
    Told,
    around,
    end_of,
    evidence,
    first_and_last,
    judged,
    span,
    statuses,
    surety,
    value,
)
from dyndiag.values import Event


def progressive_sharpening(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    series = event.series[0] if event.series else "curvature/sharpness"
    _, provisional, _ = statuses(c, series, since(event), end)
    word, dots = surety(event, "likely" if provisional else "certain")
    factor = rise(c, event, series)
    window = around(c, since(event), end, share=0.2)
    met = next_edge(c, event)
    again = any(e.kind == "edge_of_stability" and e.start < event.start for e in c.events)
    grew = f"grew {words.number(factor, 2)}-fold"
    subject = _subject(series)
    title = f"{subject} {grew}"
    if again:
        title = f"{subject} grew again, {words.number(factor, 2)}-fold"
    elif met is not None:
        title += " on the way to the edge"
    return Finding(
        event=event,
        urgency="know",
        title=title,
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=_reason(c, event, series, factor),
        what="Progressive sharpening resumes whenever the edge ratio falls below 1."
        if again
        else "Below the edge nothing stops the loss surface from getting steeper along the path.",
        people=(
            "Nothing to do.",
            "It tells how long a larger rate would still have been stable.",
        ),
        sources=(COHEN,),
        figures=evidence(figures.sharpness(c, f"sharp-{event.start}", 150, window)),
        window=window,
        chapter="stability",
        sentence=_sentence(c, event, factor, series),
        numbers=_numbers(c, event, series),
        label=f"Sharpening {words.times(factor)}",
        short="Sharpening",
    )


def _subject(series: str) -> str:
    return "Preconditioned sharpness" if "preconditioned" in series else "Sharpness"


def rise(c: Contents, event: Event, series: str) -> float:
    """Highest over first sharpness of the rise, as the detector took it."""
    return value(event, "factor", event.severity)


def since(event: Event) -> int:
    """Where the rise began: the event's start is where it was first certain."""
    return int(value(event, "since", event.start))


def next_edge(c: Contents, event: Event) -> Event | None:
    """The stay at the edge that this rise led to."""
    end = end_of(c, event)
    room = max(50, (end - event.start) // 2)
    for other in c.events:
        if other.kind == "edge_of_stability" and event.start < other.start <= end + room:
            return other
    return None


def _reason(c: Contents, event: Event, series: str, factor: float) -> str:
    values = judged(c, series, since(event), end_of(c, event))
    good, provisional, _ = statuses(c, series, since(event), end_of(c, event))
    rose = int(np.sum(np.diff(values) > 0))
    pairs = words.steps(max(0, len(values) - 1))
    parts = [
        f"from sample to sample it rose {words.steps(rose)} of {pairs} times",
        f"since step {words.steps(since(event))} it has risen {words.percent(factor - 1)}, against "
        "the 20 % that the test asks for",
    ]
    if provisional:
        parts.append(
            f"{words.steps(provisional)} of {words.steps(good + provisional)} samples are "
            "provisional (hollow)"
        )
    return "; ".join(parts) + "."


def _sentence(c: Contents, event: Event, factor: float, series: str) -> str:
    if c.get("stability/threshold") is None and c.get("stability/edge_ratio") is None:
        return (
            f"{_subject(series)} {words.fold(factor)}; for this optimizer no threshold is known, "
            "so nothing is said about the edge."
        )
    between = f"between steps {words.steps(since(event))} and {words.steps(end_of(c, event))}"
    said = f"{_subject(series)} {words.fold(factor)} {between}"
    ratio = judged(c, "stability/edge_ratio", event.start, end_of(c, event))
    if len(ratio) and ratio.max() < 1:
        return f"{said} and stayed below its threshold."
    return f"{said}."


def _numbers(c: Contents, event: Event, series: str) -> str:
    first, last = first_and_last(judged(c, series, since(event), end_of(c, event)))
    parts = (
        [f"It went from {words.number(first)} to {words.number(last)}."] if first == first else []
    )
    ratio = judged(c, "stability/edge_ratio", c.first, c.last)
    if len(ratio):
        parts.append(f"The edge ratio was {words.number(float(ratio[-1]), 2)} at the last sample.")
    return " ".join(parts)
