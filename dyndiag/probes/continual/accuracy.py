"""Accuracy on every task seen so far, in continual learning."""

from __future__ import annotations

from collections.abc import Sized

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.targets import correct_predictions
from dyndiag.state import Measurements, Task, TrainState

_DENSE = 100
"""Steps after a switch that are each evaluated."""


class AfterSwitch:
    """At every step for 100 steps after a task switch, then at every 11th, within a share.

    The share accrues while nothing happens and is spent where minima are: after a switch every
    step is due as long as something of it is left; between switches half of it is kept. Where
    evaluations are too dear for that they come at longer distances, and minima between them are
    missed.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._switch = self._last = -(10**9)
        self._cost = self._spent = 0.0

    def switched(self, step: int) -> None:
        """A new task begins at `step`."""
        self._switch = step

    def due(self, step: int, training_seconds: float, credited_seconds: float) -> bool:
        after_switch = step - self._switch < _DENSE
        if not after_switch and step - self._last < 11:
            return False
        allowed = self._share * credited_seconds * (1 if after_switch else 0.5)
        return self._spent + self._cost <= allowed

    def paid(self, step: int, seconds: float) -> None:
        self._last, self._cost = step, seconds
        self._spent += seconds


class ContinualAccuracy:
    """`continual/accuracy/<task>` of each task started so far, with `continual/samples/<task>`.

    Share of right predictions (0…1) on the task's evaluation batches, eval mode (De Lange et
    al. 2023, arXiv 2205.13452: evaluated at every iteration after a switch), and their number.
    `continual/task`: how many tasks had been started before the one under way.
    `continual/period`: steps since the last evaluation.

    Cost: one forward of every task's evaluation batches. Cadence: at every step for 100 steps after
    a switch, then at every 11th, within a budget. Misleads where that is too little: with a period
    above 1 the lowest accuracies are missed, which is told once. What `dyndiag.continual` makes of
    these series states the period as well.
    """

    name = "ContinualAccuracy"

    def __init__(self, due: AfterSwitch) -> None:
        self.due = due
        self.tasks: list[Task] = []
        self.notices: list[str] = []
        self._switch = 0
        self._last: int | None = None
        self._evaluations = 0
        self._told = False
        self._index = 0

    def start(self, task: Task, step: int, index: int | None = None) -> None:
        """From `step` on the training is on `task`, the `index`-th of the run (the next one)."""
        if not isinstance(task.name, str) or not task.name.isprintable() or not task.name:
            raise DyndiagError(
                f"a task's name becomes part of its series' name: expected a short text, "
                f"got {task.name!r}"
            )
        if isinstance(task.eval_batches, Sized) and not task.eval_batches:
            raise DyndiagError(
                f"task {task.name!r} has no evaluation batches: pass a list with at least one, "
                "as the model takes them"
            )
        if any(known.name == task.name for known in self.tasks):
            raise DyndiagError(f"task {task.name!r} was started before: name each task anew")
        self._tell_if_seldom(step)
        self.tasks.append(task)
        self._index = len(self.tasks) - 1 if index is None else index
        self.due.switched(step)
        self._switch, self._evaluations = step, 0

    def applies(self, state: TrainState) -> bool:
        return bool(self.tasks)

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        seen: Measurements = {"continual/task": float(self._index)}
        if self._last is not None and self._last < state.step:
            seen["continual/period"] = float(state.step - self._last)
        self._last = state.step
        since = state.step - self._switch
        if since >= _DENSE:
            self._tell_if_seldom(state.step)
        elif since >= 0:
            self._evaluations += 1
        for task in self.tasks:
            right: Tensor | float = 0.0
            count = 0
            for batch in task.eval_batches:
                correct, counted = correct_predictions(state.model, state.loss_fn, batch)
                right, count = right + correct, count + counted
            if count:
                seen[f"continual/accuracy/{task.name}"] = right / count
                seen[f"continual/samples/{task.name}"] = float(count)
        return seen

    def _tell_if_seldom(self, step: int) -> None:
        """Say once that the steps from a switch up to `step` were not all evaluated."""
        steps = min(step - self._switch, _DENSE)
        if self._told or len(self.tasks) < 2 or self._evaluations >= steps:
            return
        self._told = True
        self.notices.append(
            f"after the switch to task {self.tasks[-1].name!r} accuracy was measured after "
            f"{self._evaluations} of {steps} steps, as the budget allows, so the lowest accuracies "
            "may have been missed: pass fewer eval_batches, or a larger budget"
        )
