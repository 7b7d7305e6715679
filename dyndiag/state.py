"""All that a probe may see of the training, and what it hands back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from dyndiag.batches import Batch, LossFunction, MicroBatches
from dyndiag.values import Estimate

Value = Tensor | Estimate | np.ndarray | float
Measurements = dict[str | tuple[str, ...], Value | list[float]]
"""Series name → value: a 0-d tensor (left on its device until the flush), a number or an
estimate; a tensor with more dimensions is kept as an array. A tuple of names goes with one
1-d tensor, or a list, that holds their values in order."""


@dataclass(frozen=True)
class TrainState:
    """A moment of the training, just after optimizer step `step`."""

    step: int
    model: nn.Module
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    """Trainable, in model order, tied ones once."""
    names: tuple[str, ...]
    """Their names in the model."""
    loss_fn: LossFunction | None = None
    probe: MicroBatches | None = None
    """Fixed for the run."""
    batch: MicroBatches | None = None
    """What the step was taken on."""
    learning_rates: tuple[float, ...] = ()
    """Of each parameter group, as the step used them."""
    weights_before: tuple[Tensor, ...] | None = None
    """Copies of the parameters before the step, at the steps where they were kept."""
    clip_coefficients: tuple[Tensor, ...] = ()
    """What clipping by norm multiplied the gradient by, at the step before and at this one, as far
    as known: none without clipping."""

    def probe_loss(self) -> Tensor:
        """Loss of the probe batch at the present weights, with its graph. Cost: one forward."""
        assert self.loss_fn is not None and self.probe is not None
        return self.probe.loss(self.loss_fn, self.model)

    def batch_loss(self) -> Tensor:
        """Loss of the step's own batch at the present weights, with its graph."""
        assert self.loss_fn is not None and self.batch is not None
        return self.batch.loss(self.loss_fn, self.model)


@dataclass
class Task:
    """A segment of the data in continual learning, with the batches that it is judged on."""

    name: str
    eval_batches: Iterable[Batch]
