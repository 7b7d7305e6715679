"""Continual learning: accuracy on every task, and the numbers that sum it up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dyndiag.continual import ContinualMetrics, TaskMetrics
from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Item, Metrics, Table, Text, charts
from dyndiag.reports.contents import Contents
from dyndiag.reports.continual import measured

ACCURACY = "continual/accuracy/"
SELDOM = 10  # times the usual pause: longer ones are told


def continual(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    title = "Continual learning"
    if "tasks" in absent:
        return Chapter("continual", title, title, "", (absent["tasks"],), True)
    whole = measured(c)
    items: list[Item] = []
    if len(whole.tasks) > 1:
        items.append(_metrics(whole))
    items += charts([figures.accuracy(c)])
    items.append(_table(c, whole.tasks))
    items.append(
        Text(
            "Before a switch, and now: mean of the last five evaluations. Back after: steps from "
            "the next switch until it was, after the lowest point, within a point of what it "
            "reached in 300 steps. ACC, forgetting, min-ACC, WC-ACC, WF and WP are of single "
            f"evaluations, as they are defined. {_period(c, whole.period)}"
        )
    )
    return Chapter("continual", title, title, _lead(c), tuple(items))


def _lead(c: Contents) -> str:
    many = words.count(len(c.tasks()), "task")
    return f"Accuracy on the evaluation batches of {many}, in the order of training."


def _period(c: Contents, steps: float) -> str:
    if not math.isfinite(steps):
        return ""
    at = np.unique(np.concatenate([c.series[f"{ACCURACY}{task}"].steps for task in c.tasks()]))
    most, last = int(np.diff(at).max()), int(at[-1])
    apart = f"{words.plain(steps)} step{'' if steps == 1 else 's'} apart in the median"
    apart += f" and {words.steps(most)} at most" if most > SELDOM * steps else ""
    said = f"Evaluations lie {apart}; what happened between was not seen."
    if c.last - last > SELDOM * steps:
        said += f" The last was at step {words.steps(last)} of {words.steps(c.last)}."
    return said


def _metrics(whole: ContinualMetrics) -> Metrics:
    dips = [task for task in whole.tasks if math.isfinite(task.depth)]
    deepest = max(dips, key=lambda task: task.depth, default=None)
    values = [
        (_percent(whole.acc), "ACC", "mean over all tasks at the end"),
        (_points(whole.forg), "forgetting", "points, mean over earlier tasks"),
        (_percent(whole.min_acc), "min-ACC", "mean of the earlier tasks' lowest"),
        (_percent(whole.wc_acc), "WC-ACC", "worst case over all tasks"),
        (_points(whole.wf[10]), "WF¹⁰", "points, largest drop in 10 evaluations"),
        (_points(whole.wp[10]), "WP¹⁰", "points, largest rise in 10 evaluations"),
    ]
    if deepest is not None:
        values.append(
            (words.points(deepest.depth, 1), "deepest dip", f"points, task {deepest.name}")
        )
    return Metrics(tuple(values))


def _percent(share: float) -> str:
    return words.percent(share, 1) if math.isfinite(share) else "–"


def _points(difference: float) -> str:
    return words.points(difference, 1) if math.isfinite(difference) else "–"


def _table(c: Contents, found: Sequence[TaskMetrics]) -> Table:
    rows = []
    for r in found:
        again = math.isfinite(r.lowest)
        rows.append(
            (
                r.name,
                f"{words.steps(r.start)} to {words.steps(c.last if r is found[-1] else r.end)}",
                _percent(r.reference),
                f"{words.percent(r.lowest, 1)} at {words.steps(r.lowest_step)}" if again else "–",
                f"{words.steps(r.gaps[0].recovery_steps)} steps" if r.gaps else "–",
                words.percent(r.level, 1),
                words.points(r.depth, 1) if again else "–",
                words.points(r.forgetting, 1) if again else "–",
            )
        )
    begun = {r.name for r in found}
    rows += [
        (task, "never trained on", "–", "–", "–", "–", "–", "–")
        for task in c.tasks()
        if task not in begun
    ]
    head = (
        "task", "trained in steps", "at its end", "lowest after", "back after", "now", "depth",
        "forgotten",
    )  # fmt: skip
    return Table(head, tuple(rows), (False, True, True, True, True, True, True, True))
