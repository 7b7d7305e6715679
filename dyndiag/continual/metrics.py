"""ACC, FORG, min-ACC, WC-ACC, WF, WP and LCA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dyndiag.continual.gaps import Gap, gaps_of, level
from dyndiag.continual.gaps import period as median_period
from dyndiag.continual.tasks import Accuracies, Floats, Steps
from dyndiag.continual.windows import largest_drop
from dyndiag.errors import DyndiagError

AVERAGE = 5
"""Evaluations whose mean is a level, where the published definition has none."""


@dataclass(frozen=True)
class TaskMetrics:
    """One task's course."""

    name: str
    start: int
    end: int
    """Its last update, t_i; for the task under way the last evaluation of the run."""
    learned: float
    """A(E_i, t_i), at the last evaluation not after it."""
    reference: float
    """Mean of the last evaluations up to t_i."""
    lowest: float
    """min A(E_i, n), n > t_i; NaN for the task under way."""
    lowest_step: int
    """Its step; −1 for the task under way."""
    now: float
    """A(E_i, t)."""
    level: float
    """Mean of the last evaluations."""
    wf: Mapping[int, float]
    """Largest drop within w consecutive evaluations, by w; at least 0."""
    wp: Mapping[int, float]
    """Largest rise within w consecutive evaluations, by w; at least 0."""
    lca: float
    """Mean of the first β evaluations after updates on it; NaN where there are fewer."""
    gaps: tuple[Gap, ...]
    """After each later switch."""

    @property
    def depth(self) -> float:
        return self.reference - self.lowest

    @property
    def forgetting(self) -> float:
        return self.reference - self.level


@dataclass(frozen=True)
class ContinualMetrics:
    """Over the tasks so far."""

    tasks: tuple[TaskMetrics, ...]
    acc: float
    """ACC: mean of A(E_i, t) over all tasks."""
    forg: float
    """FORG: mean over earlier tasks of A(E_i, t_i) − A(E_i, t), −1…1; NaN with one task."""
    min_acc: float
    """min-ACC: mean over earlier tasks of their lowest accuracy after t_i; NaN with one task."""
    wc_acc: float
    """WC-ACC, worst case: A(E_k, t) / k + (1 − 1/k) min-ACC."""
    wf: Mapping[int, float]
    """WF^w, windowed forgetting: mean over all tasks of the largest drop, by w."""
    wp: Mapping[int, float]
    """WP^w, windowed plasticity: of the largest rise. As defined; the paper's released code skips
    starting points below the running maximum and gives smaller values."""
    lca: float
    """LCA_β, learning curve area: mean over the tasks that have β evaluations."""
    period: float
    """Median number of steps between evaluations."""


def metrics(
    accuracies: Mapping[str, Accuracies],
    starts: Mapping[str, int],
    *,
    samples: Mapping[str, float] | None = None,
    windows: Iterable[int] = (10, 100),
    beta: int = 10,
    average: int = AVERAGE,
) -> ContinualMetrics:
    """The metrics of tasks that began at the steps `starts`, evaluated as in `accuracies`.

    `samples`: predictions in each task's evaluation set, for the noise floor. Tasks without a
    start have not begun and count nowhere; NaN accuracies are left out. Cost: linear in the
    number of evaluations, whatever the windows.
    """
    windows = tuple(windows)
    if any(window < 2 for window in windows) or beta < 1 or average < 1:
        raise DyndiagError(
            f"windows count evaluations, at least 2 each, and beta and average at least 1, but got "
            f"windows {windows}, beta {beta}, average {average}"
        )
    evaluated = {task: _finite(*accuracies[task]) for task in accuracies}
    order = sorted(starts, key=lambda task: starts[task])
    last = max((int(steps[-1]) for steps, _ in evaluated.values() if len(steps)), default=0)
    ends = {task: starts[following] - 1 for task, following in pairwise(order)}
    spans = [(task, starts[task], ends.get(task, last)) for task in order]
    tasks = []
    for i, (task, start, end) in enumerate(spans):
        steps, values = evaluated.get(task, (np.empty(0, np.int64), np.empty(0)))
        if not len(steps):
            continue
        n = (samples or {}).get(task, math.nan)
        lowest, lowest_step = _lowest(steps[steps > end], values[steps > end])
        tasks.append(
            TaskMetrics(
                name=task,
                start=start,
                end=end,
                learned=_last(values[steps <= end]),
                reference=level(values[steps <= end], average),
                lowest=lowest,
                lowest_step=lowest_step,
                now=_last(values),
                level=level(values, average),
                wf={w: largest_drop(values, w) for w in windows},
                wp={w: largest_drop(-values, w) for w in windows},
                lca=_first(values[(steps >= start) & (steps <= end)], beta),
                gaps=tuple(gaps_of(steps, values, spans[i + 1 :], n, average)),
            )
        )
    every = [evaluated[task.name][0] for task in tasks] or [np.empty(0, np.int64)]
    return _over(tasks, windows, median_period(np.unique(np.concatenate(every))))


def _over(tasks: list[TaskMetrics], windows: Sequence[int], period: float) -> ContinualMetrics:
    k, earlier = len(tasks), tasks[:-1]
    least = _mean([task.lowest for task in earlier])
    worst = math.nan
    if k == 1:
        worst = tasks[0].now
    elif k > 1:
        worst = tasks[-1].now / k + (1 - 1 / k) * least
    return ContinualMetrics(
        tasks=tuple(tasks),
        acc=_mean([task.now for task in tasks]),
        forg=_mean([task.learned - task.now for task in earlier]),
        min_acc=least,
        wc_acc=worst,
        wf={w: _mean([task.wf[w] for task in tasks]) for w in windows},
        wp={w: _mean([task.wp[w] for task in tasks]) for w in windows},
        lca=_mean([task.lca for task in tasks if task.lca == task.lca]),
        period=period,
    )


def _finite(steps: Steps, values: Floats) -> Accuracies:
    kept = np.isfinite(values)
    return np.asarray(steps)[kept], np.asarray(values, dtype=np.float64)[kept]


def _last(values: Floats) -> float:
    return float(values[-1]) if len(values) else math.nan


def _first(values: Floats, count: int) -> float:
    return float(np.mean(values[:count])) if len(values) >= count else math.nan


def _lowest(steps: Steps, values: Floats) -> tuple[float, int]:
    if not len(values):
        return math.nan, -1
    i = int(np.argmin(values))
    return float(values[i]), int(steps[i])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
