"""The edge ratio rose to 1 and stayed there."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents, clipped_share
from dyndiag.reports.findings.finding import (
    COHEN,
    DAMIAN,
    Finding,
    Told,
    end_of,
    evidence,
    judged,
    span,
    statuses,
    surety,
    text,
    value,
)
from dyndiag.values import Event

REACHED = 0.97  # a largest edge ratio from which on one may say that the edge was reached
CLIPPED = 0.5  # from this share of clipped steps on, the edge is no evidence of anything
BATCH = "curvature/batch_sharpness"


def edge_of_stability(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    series = deciding(event)
    word, dots = surety(event, "certain" if _all_certified(c, series, event) else "likely")
    cut = rate_cut(c, event)
    name = at_threshold(c, event)
    window = _window(c, event)
    clipped = clipped_share(c, event.start, end)
    return Finding(
        event=event,
        urgency="know",
        title=_title(c, event, name, cut),
        when=_when(c, event, series),
        sure=word,
        dots=dots,
        reason=_reason(c, event, series),
        what=_what(c, told, clipped),
        people=_people(c, event, cut, clipped),
        sources=(COHEN, DAMIAN) if told.inside else (COHEN,),
        figures=evidence(
            figures.sharpness(c, f"edge-{event.start}-sharp", 170, window),
            figures.edge_ratio(c, f"edge-{event.start}-ratio", 110, window)
            if limit(c, event) is None
            else None,
            figures.loss(c, f"edge-{event.start}-loss", 100, window),
        ),
        window=window,
        chapter="stability",
        sentence=sentence(c, [told]),
        numbers=course(c, [told]),
        label=_label(c, event, "Edge of stability", "Near the edge", name),
        short=_label(c, event, "Edge", "Near edge", name),
        notches=tuple(spike.peak for spike in told.inside),
    )


def deciding(event: Event) -> str:
    """The series that was judged: the edge ratio, or batch sharpness."""
    return BATCH if BATCH in event.series[:1] else "stability/edge_ratio"


def limit(c: Contents, event: Event) -> float | None:
    """The threshold during the event, where it hardly changed; None where it moved."""
    series = c.get("stability/threshold")
    if series is None:
        return None
    values = series.within(event.start, end_of(c, event))
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    middle = float(np.median(values))
    inside = np.abs(values / middle - 1) < 0.02
    return middle if np.mean(inside) > 0.9 else None


def at_threshold(c: Contents, event: Event) -> str:
    """ "2/η = 5", or words where the threshold moved or has no formula."""
    found, formula = limit(c, event), figures.formula(c)
    if found is None:
        return "its threshold"
    if formula == "threshold":
        return f"its threshold {words.number(found)}"
    return f"{formula} = {words.plain(found)}"


def rate_cut(c: Contents, event: Event) -> tuple[int, float] | None:
    """Step and factor of the learning-rate cut that ended the event; None if none did."""
    if event.end is None:
        return None
    changes = figures.rates(c)
    for (_, before), (step, after) in pairwise(changes):
        interval = max(20, (event.end - event.start) * 3 // 20)
        if after < before and event.start < step <= event.end and event.end - step <= interval:
            return step, after / before
    return None


def until(c: Contents, event: Event) -> int:
    """The last step at the edge: the end, or the step before the cut that brought it about."""
    cut = rate_cut(c, event)
    return end_of(c, event) if cut is None else cut[0] - 1


def _all_certified(c: Contents, series: str, event: Event) -> bool:
    good, provisional, _ = statuses(c, series, event.start, until(c, event))
    return good > 0 and provisional == 0


def _label(c: Contents, event: Event, reached: str, near: str, name: str) -> str:
    what = near if below(c, event) else reached
    return what if name == "its threshold" else f"{what}, {name.removeprefix('its ')}"


def closest(c: Contents, event: Event) -> float:
    """The largest judged ratio of the event to its threshold; NaN if there is none."""
    values = judged(c, deciding(event), event.start, end_of(c, event))
    if not len(values):
        return math.nan
    over = limit(c, event) if deciding(event) == BATCH else 1.0
    return float(values.max()) / over if over else math.nan


def below(c: Contents, event: Event) -> bool:
    """Whether the event never got to the edge itself, only into the band around it."""
    return closest(c, event) < REACHED


def _title(c: Contents, event: Event, name: str, cut: tuple[int, float] | None) -> str:
    subject = "Batch sharpness" if deciding(event) == BATCH else "Sharpness"
    change = rate_change(c, event)
    if change is not None:
        found = limit(c, event)
        new = (
            f"the new threshold, {words.plain(found)}" if found is not None else "the new threshold"
        )
        start = f"After the rate was {change[1]}, {subject.lower()} climbed to {new}"
    else:
        start = f"{subject} reached {name}"
        if below(c, event):
            near = words.percent(1 - closest(c, event))
            start = f"{subject} came within {near} of {name}"
    if cut is not None:
        return (
            f"{start}{' and' if ' and' not in start else ','} stayed there until the rate was cut"
        )
    if event.end is None:
        return start if start.startswith("After") else f"{start} and stayed there"
    return f"{start} and stayed there for {words.steps(event.end - event.start)} steps"


def _when(c: Contents, event: Event, series: str) -> str:
    if event.end is None and not c.alive:
        steps = f"steps {words.steps(event.start)} to {words.steps(c.last)}"
        when = f"{steps}; still there when the run ended"
    else:
        when = span(c, event)
    if judged(c, series, event.start, end_of(c, event)).max(initial=0) > 1:
        return f"{when}; farthest above the edge at {words.steps(event.peak)}"
    return when


def _reason(c: Contents, event: Event, series: str) -> str:
    start, end = event.start, until(c, event)
    good, provisional, lost = statuses(c, series, start, end)
    values = judged(c, series, start, end)
    if series == BATCH:
        found = limit(c, event)
        values = values / found if found else values
        name = "batch sharpness over its threshold"
        parts = [f"{words.count(len(values), 'sample')}, one batch each"]
    else:
        name = "edge ratio"
        total = words.steps(good + provisional + lost)
        parts = [f"{words.steps(good)} of {total} samples certified"]
    if len(values):
        parts.append(
            f"median {name} {words.number(float(np.median(values)))} "
            f"({words.number(float(values.min()))} to {words.number(float(values.max()))})"
        )
    reason = "; ".join(parts) + "."
    raised = raised_share(c, start, end)
    if raised is not None and raised > 0.05:
        before = raised_share(c, max(c.first, start - (end - start)), start - 1)
        reason += f" The loss rose at {words.percent(raised)} of the steps"
        reason += f", {words.percent(before)} before." if before is not None else "."
    doubt = text(event, "in_doubt")
    if doubt:
        reason += f" In doubt: {doubt}."
    if event.confidence < 0.8 and full_batch(c) is False:
        reason += " With minibatches the ratio of a probe batch is a hint."
    return reason


def raised_share(c: Contents, start: int, end: int) -> float | None:
    """Share of the steps start … end whose loss is above the one before."""
    if c.loss is None:
        return None
    values = c.loss.within(start, end)
    values = values[np.isfinite(values)]
    return float(np.mean(np.diff(values) > 0)) if len(values) > 10 else None


def full_batch(c: Contents) -> bool | None:
    """Whether the probe batch is the batch that the steps use; None if that is not known."""
    series = c.series.get("stability/full_batch")
    if series is None or not len(series):
        return None
    return bool(np.nanmedian(series.values) == 1)


def _what(c: Contents, told: Told, clipped: float | None) -> str:
    event = told.event
    if clipped is not None and clipped >= CLIPPED:
        return (
            f"Clipping cut {words.percent(clipped)} of these steps. Clipped descent settles into a "
            "cycle at any ratio above 1, so the ratio says nothing about instability here."
        )
    nearly = "nearly " if below(c, event) else ""
    parts = [f"The step is {nearly}as long as the sharpest direction allows."]
    if told.inside:
        parts.append(_jumps(told))
    if c.loss is not None:
        before, after = c.loss.at(event.start), c.loss.at(until(c, event))
        if math.isfinite(before) and math.isfinite(after) and before != after:
            verb = "fell" if after < before else "rose"
            low, high = words.telling([before, after], 3)
            parts.append(f"From start to end of the event the loss {verb} from {low} to {high}.")
    return " ".join(parts)


def _jumps(told: Told) -> str:
    times = words.often(len(told.inside))
    folds = [value(spike, "factor", spike.severity) for spike in told.inside]
    back = [spike.end - spike.start for spike in told.inside if spike.end is not None]
    within = words.count(max(back), "step")
    most = f"{words.number(max(folds), 2)}-fold"
    if len(told.inside) == 1:
        return (
            f"The loss jumped once (notch on the timeline), {most}, and was back within {within}."
        )
    return (
        f"The loss jumped {times} (notches on the timeline), up to {most}, and was back within "
        f"{within} each time."
    )


def _people(
    c: Contents, event: Event, cut: tuple[int, float] | None, clipped: float | None
) -> tuple[str, ...]:
    if clipped is not None and clipped >= CLIPPED:
        return ("Nothing on this evidence.", "Look at the norms before and after clipping instead.")
    usual = (
        "Usually nothing: full-batch training settles here."
        if full_batch(c)
        else "Usually nothing."
    )
    lower = "For a lower, smoother loss, cut the rate"
    lower += f"; this run did, at step {words.steps(cut[0])}." if cut else "."
    return (usual, lower, "Do not read a smaller rate as “flatter”: the threshold moves with it.")


def course(c: Contents, stays: list[Told]) -> str:
    """Two sentences of numbers: when sharpness first passed each threshold; the loss."""
    parts = []
    events = sorted((told.event for told in stays), key=lambda e: e.start)
    crossings = [(event, step) for event in events if (step := _crossed(c, event)) is not None]
    if crossings:
        event, step = crossings[0]
        said = f"Sharpness passed {at_threshold(c, event)} at step {words.steps(step)}"
        later = [(e, s) for e, s in crossings[1:] if (change := rate_change(c, e)) is not None]
        if later:
            other, at = later[0]
            change = rate_change(c, other)
            found = limit(c, other)
            assert change is not None  # that is how it was chosen
            new = "the new threshold" + (f" of {words.plain(found)}" if found is not None else "")
            said += (
                f", hovered there, and passed {new} at step {words.steps(at)}, after the rate was "
                f"{change[1]} at step {words.steps(change[0])}"
            )
        parts.append(f"{said}.")
    if c.loss is not None and len(c.loss):
        start, end = figures.first(c.loss), figures.final(c.loss)
        if math.isfinite(start) and start != end:
            low, high = words.telling([start, end])
            parts.append(f"The loss {'fell' if end < start else 'rose'} from {low} to {high}.")
    return " ".join(parts)


def rate_change(c: Contents, event: Event) -> tuple[int, str] | None:
    """Step and verb of the change of the learning rate between the stay before and this one."""
    before = [
        e.start for e in c.events
        if e.kind == event.kind and e.end is not None and e.end <= event.start
    ]  # fmt: skip
    changes = figures.rates(c)
    for (_, old), (step, new) in reversed(list(pairwise(changes))):
        if before and before[-1] < step < event.start:
            halved = abs(new / old - 0.5) < 0.01 if old else False
            return step, "halved" if halved else "cut" if new < old else "raised"
    return None


def _crossed(c: Contents, event: Event) -> int | None:
    ratio = c.get("stability/edge_ratio")
    if ratio is None or deciding(event) == BATCH:
        return None
    i = int(np.searchsorted(ratio.steps, event.start))
    above = np.flatnonzero(ratio.values[i:] > 1)
    return int(ratio.steps[i + above[0]]) if len(above) else None


def _window(c: Contents, event: Event) -> tuple[int, int]:
    """The arrival: what led to the start, and the first part of the stay."""
    end = end_of(c, event)
    before = max(c.first, event.start - max(40, (end - event.start) // 5))
    after = min(c.last, event.start + max(120, round(0.35 * (end - event.start))))
    return (before, max(after, before + 1))


def sentence(c: Contents, stays: list[Told]) -> str:
    """What the verdict says of all stays at the edge together."""
    events = [told.event for told in stays]
    event = max(events, key=lambda e: end_of(c, e) - e.start)
    clipped = clipped_share(c, event.start, end_of(c, event))
    if clipped is not None and clipped >= CLIPPED:
        return (
            f"The edge ratio was above 1 from step {words.steps(event.start)}, but clipping cut "
            f"{words.percent(clipped)} of the steps, so this is no evidence of instability."
        )
    if deciding(event) == BATCH:
        found, values = limit(c, event), judged(c, BATCH, event.start, end_of(c, event))
        level = (
            f"{words.number(float(np.median(values)) / found, 2)} of"
            if found and len(values)
            else ""
        )
        return (
            f"Batch sharpness hovered at {level or 'or near'} its threshold; with minibatches that "
            "is only a hint of the edge."
        )
    steps = sum(end_of(c, e) - e.start for e in events)
    share = words.share_of(steps / max(1, c.last - c.first))
    said = f"Training spent {share} of its steps at the edge of stability"
    if all(below(c, e) for e in events):
        most = words.number(max(closest(c, e) for e in events), 2)
        said = said.replace(" at the edge", " near the edge")
        return f"{said}; the edge ratio came up to {most}."
    if full_batch(c) is False:
        return f"{said}; with minibatches that is only a hint."
    inside = [spike for told in stays for spike in told.inside]
    if len(inside) > 1:
        return f"{said}; the loss came back from each of its {words.count(len(inside), 'jump')}."
    if inside:
        return f"{said}; the loss came back from its one jump."
    return f"{said}."
