"""The optimizer step under way, for probes that read it as it passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dyndiag.state import Measurements


class StepSchedule(Protocol):
    def due(self, step: int) -> bool: ...


@runtime_checkable
class StepProbe(Protocol):
    """Reads gradients, weights and optimizer state as a step passes, without a pass of its own.

    `before` is called when the optimizer is about to step (not where a closure computes the
    gradients inside the step), `after` once it has; both only at steps that are `due`, without
    gradients being recorded. Neither changes anything, draws from a random stream, or asks an
    accelerator for a number.
    """

    @property
    def name(self) -> str: ...
    @property
    def due(self) -> StepSchedule: ...
    def before(self, step: PassingStep) -> Measurements: ...
    def after(self, step: PassingStep) -> Measurements: ...


@dataclass
class PassingStep:
    """What a probe sees of the step; what is computed from it is computed once for all probes."""

    step: int
    model: nn.Module
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    """Trainable, in model order, tied ones once. They change where layers are frozen."""
    names: tuple[str, ...]
    scale: Tensor | None = None
    """What a fused optimizer divides the gradients by; else None."""

    @cached_property
    def gradients(self) -> list[Tensor | None]:
        """As the optimizer uses them: clipped if the loop clips, unscaled; None if there is none.

        Not to be changed or kept: they are the training's own, unless `scale` is set.
        """
        grads: list[Tensor | None] = [p.grad for p in self.parameters]
        if self.scale is None:
            return grads
        return [None if g is None else g / self.scale.to(g.device, g.dtype) for g in grads]

    @cached_property
    def present(self) -> tuple[bool, ...]:
        """Which parameters have a gradient."""
        return tuple([p.grad is not None for p in self.parameters])

    @cached_property
    def gradient_norms(self) -> Tensor:
        """‖g‖₂ of each parameter's `gradients`, (parameters,), float64; NaN without a gradient."""
        found = norms([p.grad for p in self.parameters])
        return found if self.scale is None else found / self.scale.to(found.device)


@torch.no_grad()
def norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """L2 norm of each tensor, (n,), float64, on the first one's device; NaN for None.

    Accumulated in the tensors' precision, float32 at least. Cost: one read; no host sync.
    """
    found = [_values(tensor) for tensor in tensors if tensor is not None]
    if not found:
        return torch.full((len(tensors),), torch.nan, dtype=torch.float64)
    device = found[0].device
    double = any(tensor.dtype == torch.float64 for tensor in found)
    each = torch._foreach_norm(found, 2, dtype=torch.float64 if double else torch.float32)
    if any(norm.device != device for norm in each):
        each = tuple(norm.to(device) for norm in each)
    if device.type == "cpu":  # nothing to wait for, and a third of what stacking costs
        stacked = torch.tensor([norm.item() for norm in each], dtype=torch.float64)
    else:
        stacked = torch.stack(each).double()
    if len(found) == len(tensors):
        return stacked
    all_of_them = torch.full((len(tensors),), torch.nan, dtype=torch.float64, device=device)
    present = [i for i, tensor in enumerate(tensors) if tensor is not None]
    all_of_them[torch.tensor(present, device=device)] = stacked
    return all_of_them


def _values(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
