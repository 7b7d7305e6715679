"""The optimizer step under way, for probes that read it as it passes."""

from __future__ import annotations

import math
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
    def held(self) -> list[Tensor | None]:
        """`.grad` of each parameter."""
        return [p.grad for p in self.parameters]  # each access makes a Python object: once

    @cached_property
    def gradients(self) -> list[Tensor | None]:
        """As the optimizer uses them: clipped if the loop clips, unscaled; None if there is none.

        Not to be changed or kept: they are the training's own, unless `scale` is set.
        """
        if self.scale is None:
            return self.held
        scale = self.scale
        return [None if g is None else g / scale.to(g.device, g.dtype) for g in self.held]

    @cached_property
    def present(self) -> tuple[bool, ...]:
        """Which parameters have a gradient."""
        return tuple([grad is not None for grad in self.held])

    @cached_property
    def norms_on_host(self) -> list[float] | None:
        """‖g‖₂ of each parameter, NaN without a gradient; None where a device had to be asked."""
        return None if self.scale is not None else norms_on_host(self.held)

    @cached_property
    def gradient_norms(self) -> Tensor:
        """‖g‖₂ of each parameter's `gradients`, (parameters,), float64; NaN without a gradient."""
        if self.norms_on_host is not None:
            return torch.tensor(self.norms_on_host, dtype=torch.float64)
        found = norms(self.held)
        return found if self.scale is None else found / self.scale.to(found.device)


@torch.no_grad()
def norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """L2 norm of each tensor, (n,), float64, on the first one's device; NaN for None.

    Accumulated in the tensors' precision, float32 at least. Cost: one read; no host sync.
    """
    numbers = norms_on_host(tensors)
    if numbers is not None:
        return torch.tensor(numbers, dtype=torch.float64)
    present = [i for i, tensor in enumerate(tensors) if tensor is not None]
    each = _each_norm([tensor for tensor in tensors if tensor is not None])
    device = each[0].device
    stacked = torch.stack([norm.to(device) for norm in each]).double()
    if len(present) == len(tensors):
        return stacked
    all_of_them = torch.full((len(tensors),), torch.nan, dtype=torch.float64, device=device)
    all_of_them[torch.tensor(present, device=device)] = stacked
    return all_of_them


@torch.no_grad()
def norms_on_host(tensors: Sequence[Tensor | None]) -> list[float] | None:
    """The same as numbers, where no device has to be waited for; else None.

    On a CPU the calls on many small tensors would cost as much again as the norms.
    """
    plain = [
        tensor
        for tensor in tensors
        if tensor is not None
        and tensor.is_cpu
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
    ]
    if plain and len(plain) == len(tensors):  # nearly always
        return [norm.item() for norm in torch._foreach_norm(plain)]
    found = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_cpu for tensor in found):
        return None
    numbers = [norm.item() for norm in _each_norm(found)] if found else []
    if len(found) == len(tensors):
        return numbers
    left = iter(numbers)
    return [math.nan if tensor is None else next(left) for tensor in tensors]


def _each_norm(tensors: list[Tensor]) -> Sequence[Tensor]:
    if any(tensor.layout is not torch.strided or tensor.is_complex() for tensor in tensors):
        tensors = [_values(tensor) for tensor in tensors]
    double = any(tensor.dtype is torch.float64 for tensor in tensors)
    return torch._foreach_norm(tensors, 2, dtype=torch.float64 if double else torch.float32)


def _values(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
