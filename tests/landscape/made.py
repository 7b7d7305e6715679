"""Losses with known landscapes, and small trained networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(nn.Module):
    """Nothing but a vector, of float64."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(values, dtype=torch.float64))


NOTHING = torch.zeros(1)
"""Data for losses that need none."""


def double_well(model: Any, batch: Any) -> Tensor:
    """(t² − 1)²: minima at −1 and 1, a barrier of 1 between them."""
    return ((model.t**2 - 1) ** 2).sum()


def quadratic(hessian: Tensor) -> Any:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model.t @ hessian @ model.t / 2

    return loss_fn


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def task(examples: int = 256) -> tuple[Tensor, Tensor]:
    """Ten inputs, four classes that a small network made."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 10, generator=g)
    hidden = torch.tanh(x @ torch.randn(10, 16, generator=g))
    return x, (hidden @ torch.randn(16, 4, generator=g)).argmax(1)


def network(seed: int, width: int = 32) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    layers = nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    with torch.no_grad():
        for p in model.parameters():
            bound = p.shape[-1] ** -0.5
            p.copy_((2 * torch.rand(p.shape, generator=g) - 1) * bound)
    return model


def trained(
    model: nn.Sequential,
    data: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    rate: float = 0.1,
    momentum: float = 0.9,
    batch: int = 64,
) -> nn.Sequential:
    """A copy of the model, trained by SGD on batches that the seed draws."""
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(steps):
        rows = torch.randperm(len(data[0]), generator=g)[:batch]
        optimizer.zero_grad()
        cross_entropy(model, (data[0][rows], data[1][rows])).backward()
        optimizer.step()
    return model


def rescaled(model: nn.Sequential, scale: float) -> nn.Sequential:
    """The same function: the first layer's units times `scale`, the second's weights over it."""
    state = copy.deepcopy(model.state_dict())
    for name in ("0.weight", "0.bias"):
        state[name] *= scale
    state["2.weight"] /= scale
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other
