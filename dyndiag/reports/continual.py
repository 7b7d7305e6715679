"""The metrics of continual learning, of a run as the report knows it."""

from __future__ import annotations

from dyndiag.continual import ContinualMetrics, metrics
from dyndiag.continual.metrics import AVERAGE as MEAN_OF
from dyndiag.continual.tasks import task_starts
from dyndiag.reports.contents import Contents


def starts(c: Contents) -> dict[str, int]:
    """The step at which each task began, from the metadata or else from `continual/task`."""
    index = c.series.get("continual/task")
    told = None if index is None else (index.steps, index.values)
    return task_starts(c.metadata, c.tasks(), told, c.first)


def measured(c: Contents) -> ContinualMetrics:
    """The metrics, and each task's course, in the order in which they were trained."""
    series = {task: c.series[f"continual/accuracy/{task}"] for task in c.tasks()}
    samples = {task: c.series.get(f"continual/samples/{task}") for task in c.tasks()}
    return metrics(
        {task: (one.steps, one.values) for task, one in series.items()},
        starts(c),
        samples={task: float(n.values[-1]) for task, n in samples.items() if n is not None},
        windows=(10,),
    )


__all__ = ["MEAN_OF", "measured", "starts"]
