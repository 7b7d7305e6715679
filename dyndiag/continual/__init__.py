"""The metrics of continual learning, as published, from accuracies by task and step. No torch.

A(E_i, n) is the accuracy on task i's evaluation set after update n, t_i the last update on task
i, t the last evaluation so far, k the number of tasks that have begun (De Lange, van de Ven &
Tuytelaars 2023, arXiv 2205.13452). What is not defined is NaN.

What happens between two evaluations is not seen: with a period above 1 the true minima may be
lower, and the windows of WF and WP, which count evaluations, span more steps. So each result
states its period.

>>> import numpy as np
>>> steps = np.arange(6)
>>> found = metrics(
...     {"one": (steps, np.array([0.1, 0.5, 0.9, 0.5, 0.7, 0.85])),
...      "two": (steps, np.array([0.1, 0.1, 0.1, 0.4, 0.6, 0.8]))},
...     starts={"one": 0, "two": 3},
... )
>>> round(found.acc, 4), round(found.forg, 4), round(found.min_acc, 4), round(found.wc_acc, 4)
(0.825, 0.05, 0.5, 0.65)
>>> {window: round(value, 4) for window, value in found.wf.items()}
{10: 0.2, 100: 0.2}
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dyndiag.continual.gaps import Gap, noise_floor
from dyndiag.continual.metrics import AVERAGE, ContinualMetrics, TaskMetrics, metrics
from dyndiag.continual.tasks import Accuracies, in_order, task_starts
from dyndiag.continual.windows import largest_drop
from dyndiag.errors import DyndiagError
from dyndiag.store import Run

_PREFIX, _SAMPLES = "continual/accuracy/", "continual/samples/"


def continual_metrics(
    run: Run, *, windows: Iterable[int] = (10, 100), beta: int = 10, average: int = AVERAGE
) -> ContinualMetrics:
    """The metrics of a run, as far as it has come.

    `windows`: w of WF and WP, in evaluations; `beta`: of LCA; `average`: how many evaluations make
    a level. Raises DyndiagError for a run without accuracies by task.
    """
    names = run.names
    found = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
    tasks = in_order(found, run.metadata)
    if not tasks:
        raise DyndiagError(
            f"{run.folder} has no accuracies by task: declare tasks with "
            'monitor.start_task("B", eval_batches=batches)'
        )
    accuracies = {task: _column(run, _PREFIX + task) for task in tasks}
    index = _column(run, "continual/task") if "continual/task" in names else None
    first = int(min(steps[0] for steps, _ in accuracies.values()))
    samples = {
        task: float(run[_SAMPLES + task].iloc[-1]) for task in tasks if _SAMPLES + task in names
    }
    return metrics(
        accuracies,
        task_starts(run.metadata, tasks, index, first),
        samples=samples,
        windows=windows,
        beta=beta,
        average=average,
    )


def _column(run: Run, name: str) -> Accuracies:
    column = run[name]
    return np.array(column.index, dtype=np.int64), np.array(column, dtype=np.float64)


__all__ = [
    "ContinualMetrics",
    "Gap",
    "TaskMetrics",
    "continual_metrics",
    "largest_drop",
    "metrics",
    "noise_floor",
]
