"""The loss left for good."""

from __future__ import annotations

import math

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import (
    WORTSMAN_PROXIES,
    Finding,
    Told,
    around,
    end_of,
    evidence,
    judged,
    span,
    surety,
    value,
)
from dyndiag.reports.findings.precursor import intervened, rate_raised
from dyndiag.reports.findings.vanishing import vanishing


def divergence(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    word, dots = surety(event)
    first = value(event, "first_loss")
    broken = value(event, "non_finite_at")
    window = around(c, event.start, min(end, event.start + 200), share=0.5, least=60)
    raised = rate_raised(c, event)
    before = words.steps(raised[0] if raised else event.start)
    back = _below_start(c, told)
    high = f"above its starting value, {words.number(first)}," if math.isfinite(first) else "high"
    if math.isfinite(broken):
        title = f"The loss left for good at step {words.steps(event.start)}"
    elif event.end is None and back:
        title = (
            f"The loss went back to its starting value, {words.number(first)}, at step "
            f"{words.steps(event.start)} and stayed there"
        )
    elif event.end is None:
        title = f"The loss went {high} at step {words.steps(event.start)} and did not come back"
    else:
        title = f"The loss was {high} for {words.steps(end - event.start)} steps"
    return Finding(
        event=event,
        urgency="act",
        title=title,
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=_reason(told, first),
        what=_what(c, told),
        people=(
            f"Go back to a checkpoint before step {before}.",
            "Raise the rate less, or over more steps."
            if raised
            else "Lower the rate, lengthen its warm-up, or clip the gradient.",
            "If it returns at the same step, look at the data there.",
        ),
        sources=(WORTSMAN_PROXIES,),
        figures=evidence(
            figures.loss(c, f"divergence-{event.start}-loss", 150, window),
            figures.gradient_norm(c, f"divergence-{event.start}-gradient", 110, window),
            figures.edge_ratio(c, f"divergence-{event.start}-edge", 110, window),
        ),
        window=window,
        chapter="gradients",
        sentence=_sentence(c, told),
        numbers=_numbers(c, told, first),
        label="Divergence" + ("" if event.end is None else f", back at {words.steps(end)}"),
        short="Divergence",
    )


def _sentence(c: Contents, told: Told) -> str:
    event = told.event
    since = f"since step {words.steps(event.start)}"
    intervention = intervened(c, event)
    cause = f"; {intervention}" if intervention else ""
    if math.isfinite(value(event, "non_finite_at")):
        return (
            f"The loss left for good at step {words.steps(event.start)}: it is no longer a "
            f"number{cause}."
        )
    if event.end is not None:
        return (
            f"The loss was above its starting value from step {words.steps(event.start)} to "
            f"{words.steps(event.end)}, and came back{cause}."
        )
    if _below_start(c, told):
        less = "" if cause else " and is not coming down"
        return f"The loss has been back near its starting value {since}{less}{cause}."
    less = "" if cause else " and is not coming back"
    return f"The loss has been above its starting value {since}{less}{cause}."


def _below_start(c: Contents, told: Told) -> bool:
    """Whether it sits on the starting plateau rather than above it: no farther above the first
    loss than the plateau reaches below it."""
    first, threshold = value(told.event, "first_loss"), value(told.event, "threshold")
    if c.loss is None or not math.isfinite(first):
        return False
    plateau = max(first - threshold, 0.0) if math.isfinite(threshold) else 0.0
    return figures.final(c.loss) <= first + plateau


def _reason(told: Told, first: float) -> str:
    event = told.event
    lasted = words.count(int(value(event, "points", 1)), "loss", "losses")
    parts = [f"the median of five losses stayed high for {lasted}"]
    limit, peak = value(event, "threshold"), value(event, "peak_value")
    if math.isfinite(limit):
        parts.append(f"high is above {words.number(limit)}")
    if math.isfinite(peak):
        parts.append(f"the highest median was {words.number(peak)}")
    broken = value(event, "non_finite_at")
    if math.isfinite(broken):
        parts.append(f"it was not finite from step {words.steps(int(broken))} on")
    return "; ".join(parts) + "."


def _what(c: Contents, told: Told) -> str:
    event = told.event
    parts = ["The weights have left the region in which training had made progress."]
    intervention = intervened(c, event)
    if intervention:
        parts.append(f"{words.capital(intervention)}.")
    ratio = judged(c, "stability/edge_ratio", event.start - 200, event.start)
    if len(ratio):
        parts.append(f"The edge ratio was {words.number(float(ratio[-1]), 2)} just before.")
    if told.inside:
        parts.append(f"It began with {words.count(len(told.inside), 'jump')} of the loss.")
    parts += [vanishing(c)] if event.end is None and vanishing(c) else []
    return " ".join(parts)


def _numbers(c: Contents, told: Told, first: float) -> str:
    if c.loss is None or not math.isfinite(first):
        return ""
    before = c.loss.within(c.first, told.event.start)
    finite = before[before == before]
    parts = [f"The loss began at {words.number(first)}"]
    if len(finite) > 2:
        parts.append(f"had fallen to {words.number(float(finite.min()))}")
    parts.append(f"{'stands' if c.alive else 'ended'} at {words.number(figures.final(c.loss))}")
    return f"{words.listing(parts)}."
