"""The Hessian of a run's losses, by an engine that its first use has found to be right."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from dyndiag.batches import LossFunction, MicroBatches
from dyndiag.curvature import LossHessian, hessian, loss_hessian
from dyndiag.state import TrainState

_FAST = "cached"


class CheckedHessian:
    """One for all probes of a run: a custom kernel's second derivative can be silently wrong.

    Before the first one `curvature.hessian` compares a product with finite differences on a few
    examples (one gradient, and 2 to 6 of these examples). Where the kept graph of a gradient stands
    the check, it is what every sample uses; else each is built by the engine that was chosen, and
    why is told once, in `notices`.
    """

    def __init__(self) -> None:
        self._engine: str | None = None
        self.notices: list[str] = []

    def of_probe(self, state: TrainState) -> LossHessian:
        """Of the probe batch's loss, over the state's parameters, in the model's present mode."""
        assert state.probe is not None
        return self._of(state, state.probe)

    def of_batch(self, state: TrainState) -> LossHessian:
        """Of the loss of the step's own batch."""
        assert state.batch is not None
        return self._of(state, state.batch)

    def _of(self, state: TrainState, batches: MicroBatches) -> LossHessian:
        assert state.loss_fn is not None
        if self._engine != _FAST:
            found = hessian(
                state.model, partial(_loss, state.loss_fn), batches, parameters=state.parameters
            )
            if self._engine is None and found.engine.name != _FAST:
                self.notices.append(
                    f"Hessian-vector products by {found.engine.name}: {found.engine.reason}"
                )
            self._engine = found.engine.name
            if self._engine != _FAST:
                return found
        loss = partial(batches.loss, state.loss_fn, state.model)
        return loss_hessian(loss, state.parameters)


def _loss(loss_fn: LossFunction, model: nn.Module, batches: MicroBatches) -> Tensor:
    return batches.loss(loss_fn, model)
