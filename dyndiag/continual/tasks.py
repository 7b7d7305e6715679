"""Which tasks there were, and when each began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Steps = NDArray[np.int64]
Floats = NDArray[np.float64]
Accuracies = tuple[Steps, Floats]
"""Steps, ascending, and the accuracy after each."""


def in_order(tasks: Iterable[str], metadata: Mapping[str, object]) -> tuple[str, ...]:
    """Tasks in the order in which they were trained, as far as the metadata tell."""
    told = metadata.get("tasks")
    order = [str(task) for task in told] if isinstance(told, Sequence) else []
    return tuple(sorted(tasks, key=lambda t: (order.index(t) if t in order else 1e9, t)))


def task_starts(
    metadata: Mapping[str, object], tasks: Sequence[str], index: Accuracies | None, first: int
) -> dict[str, int]:
    """The step at which each task began: as the metadata tell, or where `continual/task`, the
    `index` of the task under way, first has its number; without both, the first at `first`."""
    told = metadata.get("task_starts")
    if isinstance(told, Mapping) and all(task in told for task in tasks):
        return {task: int(told[task]) for task in tasks}
    if index is None:
        return dict.fromkeys(tasks[:1], first)
    steps, numbers = index
    return {
        task: int(steps[np.flatnonzero(numbers == i)[0]])
        for i, task in enumerate(tasks)
        if np.any(numbers == i)
    }
