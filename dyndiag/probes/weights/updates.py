"""How far a step moved the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndiag.probes.modules import ModuleNorms
from dyndiag.probes.passing import norms
from dyndiag.schedule import Every
from dyndiag.state import Measurements, TrainState


class UpdateRatio:
    """`updates/ratio` and `updates/ratio/<module>`: ‖Δθ‖₂ / ‖θ‖₂, θ before the step.

    The true change of the weights, decay included. NaN where the weights were zero.
    Cost: a copy of the weights and two reads of them, every 11th step (at every step of the
    first 44, where Adam-like optimizers may overshoot); no host sync.
    """

    name = "UpdateRatio"

    def __init__(self, names: Sequence[str], due: Every | None = None) -> None:
        self.due = due or Every(11, dense_until=44)
        self._norms = ModuleNorms(names)

    @staticmethod
    @torch.no_grad()
    def before(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        """Copies of the weights, to be handed to `measure` in `state.weights_before`."""
        return tuple([p.detach().clone() for p in parameters])

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        """Overwrites the copies with the change: to be called last."""
        assert state.weights_before is not None
        change = list(state.weights_before)
        size = self._norms.squares(norms(change))
        torch._foreach_sub_(change, list(state.parameters))
        ratio = (self._norms.squares(norms(change)) / size).sqrt()
        ratio = torch.where(ratio.isinf(), torch.nan, ratio)
        names = ("updates/ratio", *(f"updates/ratio/{module}" for module in self._norms.modules))
        return {names: ratio}
