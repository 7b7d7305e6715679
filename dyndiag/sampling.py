"""Taking the measurements that are due: inside the guard, timed, at no risk to the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from dyndiag import schedule
from dyndiag.batches import LossFunction
from dyndiag.boundary import Boundary
from dyndiag.guard import no_trace
from dyndiag.probes import Probe, StepProbe, unwatched
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate


class Sampler:
    """Runs probes that take passes of their own, and keeps what they cost."""

    def __init__(
        self,
        probes: list[Probe],
        share: float,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction | None,
        boundary: Boundary,
    ) -> None:
        self._probes, self._share, self._boundary = probes, share, boundary
        self.guarded = partial(no_trace, model, optimizer, loss_fn)
        """The guard, for whatever else must leave no trace."""
        self._began = time.perf_counter()
        self._seconds = 0.0
        self.cost: dict[str, dict[str, float]] = {}
        """Of each probe by name: seconds, samples, products."""

    @property
    def training_seconds(self) -> float:
        """Wall time since the start, less what the probes took."""
        return time.perf_counter() - self._began - self._seconds

    def measure_due(self, state: TrainState, keep: Callable[[Measurements], None]) -> None:
        """Run every probe that is due at this step and can be run on this state."""
        seconds = self.training_seconds
        worth = schedule.credited(seconds, self._share, schedule.GRACE)
        for probe in self._probes:
            if probe.applies(state) and probe.due.due(state.step, seconds, worth):
                self.measure(probe, state, keep)

    def measure(
        self, probe: Probe, state: TrainState, keep: Callable[[Measurements], None]
    ) -> None:
        """Run one probe now."""
        state = _of_what_trains(state)
        if not probe.applies(state):
            return
        before = time.perf_counter()
        seen: Measurements = {}
        try:
            with self._boundary(probe.name), unwatched(), self.guarded():
                seen = probe.measure(state)
                _wait_for(state)
        finally:
            seconds = time.perf_counter() - before
            self._seconds += seconds
            probe.due.paid(state.step, seconds)
        keep(seen)
        tell_notices(probe, self._boundary)
        if seen:
            cost = self.cost.setdefault(probe.name, {"seconds": 0.0, "samples": 0, "products": 0})
            cost["seconds"] += seconds
            cost["samples"] += 1
            cost["products"] += sum(
                value.products for value in seen.values() if isinstance(value, Estimate)
            )


def _of_what_trains(state: TrainState) -> TrainState:
    """Without parameters that were frozen since somebody looked: they have no derivative."""
    if all(p.requires_grad for p in state.parameters):
        return state
    kept = [i for i, p in enumerate(state.parameters) if p.requires_grad]
    weights = state.weights_before
    return replace(
        state,
        parameters=tuple(state.parameters[i] for i in kept),
        names=tuple(state.names[i] for i in kept),
        weights_before=None if weights is None else tuple(weights[i] for i in kept),
    )


def tell_notices(probe: Probe | StepProbe, boundary: Boundary) -> None:
    """Tell the user what a probe has to say, and forget it."""
    notices: list[str] = getattr(probe, "notices", [])
    while notices:
        boundary.tell(probe.name, notices.pop(0))


def _wait_for(state: TrainState) -> None:
    # A sample's cost is known only when it is done; samples are few and have waited before.
    if state.parameters and state.parameters[0].device.type == "cuda":
        torch.cuda.synchronize(state.parameters[0].device)
