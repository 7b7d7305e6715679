"""How far a step moved the weights."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndiag.probes.modules import ModuleNorms
from dyndiag.probes.passing import norms
from dyndiag.schedule import Every, WithinShare
from dyndiag.state import Measurements, TrainState


class UpdateRatio:
    """`updates/ratio` and `updates/ratio/<module>`: ‖Δθ‖₂ / ‖θ‖₂, θ before the step.

    The true change of the weights, decay included. NaN where the weights were zero.
    When: at every step of the first 44, where Adam-like optimizers may overshoot, then at every
    11th, and after 500 steps there or at odd multiples, within 0.01 % of the time.
    Cost: a copy of the weights and two reads of them; no host sync.
    """

    name = "UpdateRatio"

    def __init__(self, names: Sequence[str]) -> None:
        self._due = WithinShare(0.0001, Every(11, dense_until=44))
        self._norms = ModuleNorms(names)
        self._seconds = 0.0

    def before(self, step: int, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...] | None:
        """Copies of the weights, for `measure` in `state.weights_before`; None where not due."""
        began = time.perf_counter()
        if not self._due.due(step, began):
            return None
        with torch.no_grad():
            copies = tuple([p.detach().clone() for p in parameters])
        self._seconds = time.perf_counter() - began
        return copies

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        """Overwrites the copies with the change: to be called last."""
        assert state.weights_before is not None
        began = time.perf_counter()
        change = list(state.weights_before)
        size = self._norms.squares(norms(change))
        torch._foreach_sub_(change, list(state.parameters))
        ratio = (self._norms.squares(norms(change)) / size).sqrt()
        ratio = torch.where(ratio.isinf(), torch.nan, ratio)
        names = ("updates/ratio", *(f"updates/ratio/{module}" for module in self._norms.modules))
        self._due.paid(self._seconds + time.perf_counter() - began)
        return {names: ratio}
