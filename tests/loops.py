"""A training loop with a monitor, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dyndiag
from tests.models import batches, cross_entropy

BATCHES = batches("mlp", 4)


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def train(
    monitor: dyndiag.Monitor, model: nn.Module, optimizer: Any, steps: int = 5, **told: Any
) -> list[float]:
    losses = []
    for step in range(steps):
        batch = BATCHES[step % 4]
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        monitor.step(**({"loss": loss, "batch": batch} | told))
    return losses
