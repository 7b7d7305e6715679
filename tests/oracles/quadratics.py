"""Real torch optimizers on quadratics ½θᵀHθ: whether they shrink or grow is a matter of fact."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Freeze = Callable[[Optimizer, Tensor], None]


def split(hessian: Tensor, pieces: int = 1) -> list[nn.Parameter]:
    """Start weights, small and without a pattern, cut into parameters of equal length."""
    theta = 1e-6 * torch.randn(
        len(hessian), generator=torch.Generator().manual_seed(0), dtype=hessian.dtype
    )
    return [nn.Parameter(part.clone()) for part in theta.chunk(pieces)]


def one_step(
    optimizer: Optimizer, parameters: list[nn.Parameter], hessian: Tensor, freeze: Freeze | None
) -> float:
    """A step on the exact gradient; the norm of the weights after it."""
    with torch.no_grad():
        theta = torch.cat([p.detach() for p in parameters])
        sizes = [p.numel() for p in parameters]
        for p, g in zip(parameters, (hessian @ theta).split(sizes), strict=True):
            p.grad = g.clone()
            if freeze is not None:
                freeze(optimizer, p)
        optimizer.step()
        return float(torch.cat([p.detach() for p in parameters]).norm())


def growth(
    optimizer: Optimizer,
    parameters: list[nn.Parameter],
    hessian: Tensor,
    steps: int = 2000,
    freeze: Freeze | None = None,
    most: float = 1e3,
) -> float:
    """Growth factor a step over the second half of the run: below 1 stable, above 1 unstable.

    `most` ends a run that grows, before its gradient can reach a frozen second moment.
    """
    norms = []
    for _ in range(steps):
        norm = one_step(optimizer, parameters, hessian, freeze)
        if not norm < most:
            return math.inf
        if norm < 1e-290:
            return 0.0
        norms.append(norm)
    half = steps // 2
    return (max(norms[-50:]) / max(norms[half - 50 : half])) ** (1 / (steps - half))


def positive_definite(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T
