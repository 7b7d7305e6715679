"""Accuracy on every task seen so far, in continual learning."""

from __future__ import annotations

from collections.abc import Sized

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions import correct_predictions
from dyndiag.state import Measurements, Task, TrainState


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
        after_switch = step - self._switch < 100
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
    al. 2023, arXiv 2205.13452: evaluated at every iteration after a switch). Cost: one forward
    of every task's evaluation batches.
    """

    name = "ContinualAccuracy"

    def __init__(self, due: AfterSwitch) -> None:
        self.due = due
        self.tasks: list[Task] = []

    def start(self, task: Task, step: int) -> None:
        """From `step` on the training is on `task`."""
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
        self.tasks.append(task)
        self.due.switched(step)

    def applies(self, state: TrainState) -> bool:
        return bool(self.tasks)

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        seen: Measurements = {"continual/task": float(len(self.tasks) - 1)}
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
