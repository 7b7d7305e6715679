"""Steps with probes on them, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.probes.passing import PassingStep, StepProbe
from dyndiag.rows import Rows
from dyndiag.state import Measurements


def passing(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 0, **options: Any
) -> PassingStep:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return PassingStep(
        step, model, optimizer, tuple(p for _, p in named), tuple(n for n, _ in named), **options
    )


@torch.no_grad()
def take(
    probe: StepProbe, model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 0
) -> dict[str, Any]:
    """Take the step with the gradients there are, and read it if the probe is due."""
    seen: Measurements = {}
    due, under_way = probe.due.due(step), passing(model, optimizer, step)
    if due:
        seen |= probe.before(under_way)
    optimizer.step()
    if due:
        seen |= probe.after(under_way)
    return row(seen)


def row(seen: Measurements) -> dict[str, Any]:
    rows = Rows()
    rows.add(0, seen)
    return rows.to_host()[0][1]


def parameters(*values: Sequence[float] | Tensor, dtype: Any = torch.float64) -> nn.ParameterDict:
    """A model of nothing but parameters, named a, b, …"""
    return nn.ParameterDict(
        {"abcdefgh"[i]: torch.as_tensor(v, dtype=dtype) for i, v in enumerate(values)}
    )


def give(model: nn.Module, *gradients: Sequence[float] | Tensor | None) -> None:
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = None if gradient is None else torch.as_tensor(gradient, dtype=p.dtype)
