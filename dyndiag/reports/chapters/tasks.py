"""Continual learning: accuracy on every task, and the numbers that sum it up."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Item, Metrics, Table, Text, charts
from dyndiag.reports.contents import Contents
from dyndiag.reports.continual import Summary, TaskResult, results, summary


def continual(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    title = "Continual learning"
    if "tasks" in absent:
        return Chapter("continual", title, title, "", (absent["tasks"],), True)
    found, whole = results(c), summary(c)
    items: list[Item] = []
    if whole is not None and len(found) > 1:
        items.append(_metrics(whole, found))
    items += charts([figures.accuracy(c)])
    items.append(_table(c, found))
    items.append(
        Text(
            "Before a switch, and now: mean of the last five evaluations. ACC, forgetting, min-ACC "
            "and WC-ACC are of single evaluations, as they are defined."
        )
    )
    return Chapter("continual", title, title, _lead(c), tuple(items))


def _lead(c: Contents) -> str:
    many = words.count(len(c.tasks()), "task")
    return f"Accuracy on the evaluation batches of {many}, in the order of training."


def _metrics(whole: Summary, found: list[TaskResult]) -> Metrics:
    deepest = max((r for r in found if math.isfinite(r.depth)), key=lambda r: r.depth, default=None)
    values = [
        (words.percent(whole.accuracy, 1), "ACC", "mean over all tasks at the end"),
        (_points(whole.forgetting), "forgetting", "points, mean over earlier tasks"),
        (_percent(whole.lowest), "min-ACC", "mean of the earlier tasks' lowest"),
        (_percent(whole.worst_case), "WC-ACC", "worst case over all tasks"),
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


def _table(c: Contents, found: list[TaskResult]) -> Table:
    rows = []
    for r in found:
        again = math.isfinite(r.lowest)
        rows.append(
            (
                r.name,
                f"{words.steps(r.start)} to {words.steps(r.end)}",
                words.percent(r.reference, 1),
                f"{words.percent(r.lowest, 1)} at {words.steps(r.lowest_step)}" if again else "–",
                words.percent(r.now, 1),
                words.points(r.depth, 1) if again else "–",
                words.points(r.forgetting, 1) if again else "–",
            )
        )
    begun = {r.name for r in found}
    rows += [
        (task, "never trained on", "–", "–", "–", "–", "–")
        for task in c.tasks()
        if task not in begun
    ]
    head = ("task", "trained in steps", "at its end", "lowest after", "now", "depth", "forgotten")
    return Table(head, tuple(rows), (False, True, True, True, True, True, True))
