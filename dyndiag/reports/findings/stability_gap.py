"""After a switch of tasks an old one was lost for a while, and came back."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.continual import MEAN_OF, starts
from dyndiag.reports.figures import Note
from dyndiag.reports.findings.finding import (
    DE_LANGE,
    HESS,
    Finding,
    Told,
    end_of,
    evidence,
    judged,
    safe,
    span,
    surety,
    text,
    value,
)
from dyndiag.values import Event

PREFIX = "continual/accuracy/"
WINDOW = 300  # steps after a switch that the detector watches


def stability_gap(told: Told, c: Contents) -> Finding:
    event = told.event
    task = _task(event)
    new, switch = switched_to(c, event)
    before, lowest, after = levels(c, event)
    end = end_of(c, event)
    word, dots = surety(event)
    room = max(60, (end - switch) // 2)
    window = (max(c.first, switch - 30), min(c.last, max(end, event.peak) + room))
    depth, missing = before - lowest, before - after
    name, other = safe(task, 30), safe(new, 30)
    fell = f"Task {name} fell from {words.percent(before, 1)} to {words.percent(lowest, 1)}"
    title = f"{fell} right after the switch, and came back to {words.percent(after, 1)}"
    if event.end is None:
        title = f"{fell} after the switch and was not back when the run ended"
    return Finding(
        event=event,
        urgency="look",
        title=title,
        when=_when(c, event, switch),
        sure=word,
        dots=dots,
        reason=_reason(c, event),
        what=_what(c, task, before, lowest, after, switch),
        people=(
            "Evaluate old tasks during the first 100 steps after a switch; at the end of the task "
            "this dip is invisible.",
            "Replay does not remove the dip; constraining the first steps is still research.",
            "If a service uses the weights while they train, hold the old ones back until the "
            "recovery.",
        ),
        sources=(DE_LANGE, HESS),
        figures=evidence(
            figures.task_accuracy(
                c, task, window, before, f"gap-{event.start}-{_slug(task)}",
                *_marks(event, lowest, after),
            ),
            figures.edge_ratio(c, f"gap-{event.start}-{_slug(task)}-edge", 110, window),
        ),
        window=window,
        chapter="continual",
        sentence=_sentence(name, other, event, switch, depth, missing),
        numbers=_numbers(event, name, before, lowest, after, missing),
        label=f"Stability gap, task {safe(task, 16)} −{words.points(depth)} points",
        short=f"Gap −{words.points(depth)}",
        notches=(),
    )  # fmt: skip


def _slug(task: str) -> str:
    return "".join(ch if ch.isalnum() and ch.isascii() else "-" for ch in task)[:24]


def _task(event: Event) -> str:
    for name in event.series:
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
    return text(event, "task") or "?"


def switched_to(c: Contents, event: Event) -> tuple[str, int]:
    """The task that had begun when the old one fell, and its first step."""
    begun = [(start, task) for task, start in starts(c).items() if start <= event.start + 1]
    if not begun:
        return "the new one", event.start
    start, task = max(begun)
    return task, start


def levels(c: Contents, event: Event) -> tuple[float, float, float]:
    """Accuracy before the switch (mean of five), at the lowest point, and where it came back to:
    the mean of the last five evaluations of the watched time, as far as the run goes."""
    series = c.series.get(PREFIX + _task(event))
    if series is None:
        return (math.nan, math.nan, math.nan)
    _, switch = switched_to(c, event)
    later = [start for start in starts(c).values() if start > switch]
    until = min([switch + WINDOW, *[start - 1 for start in later], c.last])
    before = series.within(c.first, switch - 1)[-MEAN_OF:]
    inside = series.within(switch, until)
    lowest = series.at(event.peak)
    reference = value(event, "reference", float(np.mean(before)) if len(before) else math.nan)
    after = float(np.mean(inside[-MEAN_OF:])) if len(inside) else math.nan
    return reference, lowest, after


def _when(c: Contents, event: Event, switch: int) -> str:
    parts = [span(c, event), f"lowest {words.count(event.peak - switch, 'step')} after the switch"]
    if event.end is not None:
        parts.append(f"recovered after {words.steps(event.end - switch)}")
    return f"{parts[0]}: {', '.join(parts[1:])}"


def _reason(c: Contents, event: Event) -> str:
    _, lowest, after = levels(c, event)
    transient = value(event, "transient", after - lowest)
    floor = value(event, "threshold", 0.05)
    samples = c.series.get(f"continual/samples/{_task(event)}")
    many = ""
    if samples is not None and len(samples):
        many = f" ({words.steps(int(np.nanmax(samples.values)))} predictions)"
    reason = (
        f"the part that came back, {words.points(transient, 1)} points, is "
        f"{words.number(transient / floor, 2)} times the least that counts, "
        f"{words.points(floor, 1)} points{many}."
    )
    series = c.series.get(PREFIX + _task(event))
    if series is not None:
        inside = series.steps[(series.steps >= event.start) & (series.steps <= end_of(c, event))]
        apart = int(np.max(np.diff(inside))) if len(inside) > 1 else 1
        reason += (
            " Evaluated at every step, so the lowest point was not missed."
            if apart == 1
            else f" Evaluations lie up to {words.steps(apart)} steps apart; the true minimum may "
            "be lower."
        )
    doubt = text(event, "in_doubt")
    return f"{reason} In doubt: {doubt}." if doubt else reason


def _what(c: Contents, task: str, before: float, lowest: float, after: float, switch: int) -> str:
    missing = before - after
    parts = [
        f"New-task gradients overwrite what task {safe(task, 30)} needs before it is repaired.",
        f"{words.points(after - lowest, 1)} points were transient; "
        + (
            f"{words.points(missing, 1)} points are still missing."
            if missing > 0
            else "nothing is missing."
        ),
    ]
    earlier = judged(c, "stability/edge_ratio", switch - 60, switch - 1)
    then = judged(c, "stability/edge_ratio", switch, switch + 20)
    if len(earlier) and len(then) and then.max() > 2 * np.median(earlier):
        parts.append(
            f"The edge ratio rose from {words.number(float(np.median(earlier)), 2)} to "
            f"{words.number(float(then.max()), 2)}."
        )
    return " ".join(parts)


def _sentence(
    name: str, other: str, event: Event, switch: int, depth: float, missing: float
) -> str:
    lost = words.points(depth)
    said = (
        f"Switching to task {other} cost task {name} {lost} points within "
        f"{words.count(max(1, event.peak - switch), 'step')}"
    )
    back = words.points(depth - missing)
    if missing < 0.005:
        return f"{said}; all of them came back."
    if event.end is None:
        return f"{said}; {back} of them had come back when the run ended."
    return f"{said}; {back} of them came back."


def _numbers(
    event: Event, name: str, before: float, lowest: float, after: float, missing: float
) -> str:
    first = (
        f"Task {name} was at {words.percent(before, 1)} before the switch, at "
        f"{words.percent(lowest, 1)} at step {words.steps(event.peak)} and at "
        f"{words.percent(after, 1)} at the end."
    )
    if missing <= 0:
        return f"{first} Someone who only evaluates at the end of each task misses it all."
    return (
        f"{first} Someone who only evaluates at the end of each task sees a loss of "
        f"{words.points(missing, 1)} points and misses the rest."
    )


def _marks(
    event: Event, lowest: float, after: float
) -> tuple[tuple[tuple[float, float], ...], tuple[Note, ...]]:
    at = ((float(event.peak), lowest),)
    text = f"{words.percent(lowest, 1)} at step {words.steps(event.peak)}"
    return at, (Note(float(event.peak), text, lowest, dx=8, dy=14),)
