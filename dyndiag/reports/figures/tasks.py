"""Accuracy by task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.figures.figure import COLOURS, Drawn, Figure, Mark, Note
from dyndiag.reports.figures.loss import final
from dyndiag.reports.thinning import Floats


def wilson(accuracy: Floats, samples: Floats) -> tuple[Floats, Floats]:
    """Ends of the 95 % Wilson interval of a share measured on `samples` predictions."""
    z = 1.959964
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (accuracy + z * z / (2 * samples)) / (1 + z * z / samples)
        half = (
            z
            * np.sqrt(accuracy * (1 - accuracy) / samples + z * z / (4 * samples**2))
            / (1 + z * z / samples)
        )
    return middle - half, middle + half


def _task(c: Contents, task: str, cls: str, label: str) -> tuple[Mark, Drawn]:
    series = c.series[f"continual/accuracy/{task}"]
    samples = c.series.get(f"continual/samples/{task}")
    if samples is None or not len(samples):
        return Mark("line", series.name, label, cls, fmt="percent"), Drawn(series.name, series)
    at = np.clip(np.searchsorted(samples.steps, series.steps, side="right") - 1, 0, None)
    lower, upper = wilson(series.values, samples.values[at])
    mark = Mark("band", series.name, label, cls, fmt="percent")
    return mark, Drawn(series.name, series, lower, upper)


def accuracy(
    c: Contents,
    id: str = "accuracy",
    height: int = 240,
    context: bool = False,
    xaxis: bool = True,
) -> Figure | None:
    """A line with its Wilson band for each task; with more than four tasks a heat map's place is
    taken by the first two, the worst, and the last one."""
    tasks = c.tasks()
    if not tasks:
        return None
    more = ""
    if len(tasks) > 4:
        worst = min(tasks[:-1], key=lambda t: final(c.series[f"continual/accuracy/{t}"], 5))
        chosen = dict.fromkeys([tasks[0], tasks[1], worst, tasks[-1]])
        more = f"; {len(chosen)} of {len(tasks)} tasks, the rest in the table"
        tasks = tuple(chosen)
    pairs = [_task(c, task, cls, f"task {task}") for task, cls in zip(tasks, COLOURS, strict=False)]
    return Figure(
        id, "Accuracy by task", f"{samples_text(c, tasks)}{more}", height,
        tuple(mark for mark, _ in pairs), tuple(drawn for _, drawn in pairs),
        {"min": 0, "max": 1.04, "fmt": "percent"}, context=context, xaxis=xaxis,
        says="Accuracy of each task at every evaluation.",
    )  # fmt: skip


def samples_text(c: Contents, tasks: Sequence[str]) -> str:
    counts = set()
    for task in tasks:
        series = c.series.get(f"continual/samples/{task}")
        if series is not None and len(series):
            counts.add(int(np.nanmax(series.values)))
    if not counts:
        return "held-out samples; their number is not known"
    many = words.steps(counts.pop()) if len(counts) == 1 else f"{min(counts):,} or more"
    return f"{many} predictions each; band: 95 % interval (Wilson)"


def task_accuracy(
    c: Contents, task: str, window: tuple[int, int], reference: float, id: str,
    points: Sequence[tuple[float, float]] = (), notes: tuple[Note, ...] = (),
) -> Figure | None:  # fmt: skip
    """One task around a switch, with the level before it dotted."""
    if f"continual/accuracy/{task}" not in c.series:
        return None
    mark, drawn = _task(c, task, "s1", "accuracy")
    marks = [mark, Mark("points", cls="s4", at=tuple(points))]
    if math.isfinite(reference):
        marks.append(Mark("rule", y=reference, cls="s1", dash="dot"))
    return Figure(
        id, f"Accuracy of task {task}", "95 % interval; dotted: before the switch", 170,
        tuple(marks), (drawn,), {"fmt": "percent"}, window=window, notes=notes,
    )  # fmt: skip
