"""Numbers of continual learning from accuracies by task, as De Lange et al. (2205.13452) define
them, each evaluation at its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dyndiag.reports.contents import Contents, Series

MEAN_OF = 5  # evaluations


@dataclass(frozen=True)
class TaskResult:
    """One task. Accuracies in 0…1; NaN where a number is not defined."""

    name: str
    start: int
    end: int
    """The last step at which it was trained on."""
    reference: float
    """Mean of its last five evaluations up to `end`."""
    lowest: float
    """The smallest accuracy after `end`."""
    lowest_step: int
    now: float
    """Mean of its last five evaluations."""

    @property
    def forgetting(self) -> float:
        return self.reference - self.now

    @property
    def depth(self) -> float:
        return self.reference - self.lowest


@dataclass(frozen=True)
class Summary:
    """Over all tasks so far: ACC, FORG, min-ACC, WC-ACC. NaN where there is only one task."""

    accuracy: float
    forgetting: float
    lowest: float
    worst_case: float


def starts(c: Contents) -> dict[str, int]:
    """The step at which each task began, from the metadata or else from `continual/task`."""
    told = c.metadata.get("task_starts")
    tasks = c.tasks()
    if isinstance(told, Mapping) and all(task in told for task in tasks):
        return {task: int(told[task]) for task in tasks}
    index = c.series.get("continual/task")
    if index is None:
        return dict.fromkeys(tasks[:1], c.first)
    return {
        task: int(index.steps[np.flatnonzero(index.values == i)[0]])
        for i, task in enumerate(tasks)
        if np.any(index.values == i)
    }


def results(c: Contents) -> list[TaskResult]:
    """Each task's course, in the order in which they were trained."""
    begun = starts(c)
    order = [task for task in c.tasks() if task in begun]
    out = []
    for i, task in enumerate(order):
        series = c.series[f"continual/accuracy/{task}"]
        end = begun[order[i + 1]] - 1 if i + 1 < len(order) else c.last
        out.append(_result(task, series, begun[task], end))
    return out


def _result(task: str, series: Series, start: int, end: int) -> TaskResult:
    before = series.values[series.steps <= end]
    later = series.steps > end
    lowest, step = math.nan, end
    if np.any(later) and np.any(np.isfinite(series.values[later])):
        i = int(np.nanargmin(series.values[later]))
        lowest, step = float(series.values[later][i]), int(series.steps[later][i])
    return TaskResult(task, start, end, _mean(before), lowest, step, _mean(series.values))


def _mean(values: np.ndarray) -> float:
    last = values[np.isfinite(values)][-MEAN_OF:]
    return float(np.mean(last)) if len(last) else math.nan


def summary(c: Contents) -> Summary | None:
    """The numbers over all tasks, by their definitions: single evaluations, not means of five.

    FORG = mean over earlier tasks of A(E_i, t_i) − A(E_i, now); min-ACC the mean of their smallest
    accuracies after t_i; WC-ACC = A(E_k, now) / k + (1 − 1/k) min-ACC.
    """
    found = results(c)
    if not found:
        return None
    now, at_end, lowest = [], [], []
    for result in found:
        series = c.series[f"continual/accuracy/{result.name}"]
        now.append(float(series.values[-1]))
        at_end.append(series.at(result.end))
        lowest.append(result.lowest)
    k = len(found)
    if k == 1:
        return Summary(now[0], math.nan, math.nan, now[0])
    least = float(np.mean(lowest[:-1]))
    return Summary(
        float(np.mean(now)),
        float(np.mean(np.subtract(at_end[:-1], now[:-1]))),
        least,
        now[-1] / k + (1 - 1 / k) * least,
    )
