"""No landscape changes weights, modes, gradients or random streams, even where it fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyndiag import landscape
from tests.models import KINDS, batches, cross_entropy, model_of
from tests.promises.test_leaves_no_trace import everything

Look = Callable[[nn.Module, Any, Any], Any]

LOOKS: dict[str, Look] = {
    "line": lambda m, f, d: landscape.line(m, f, d, points=3),
    "in train mode": lambda m, f, d: landscape.line(m, f, d, points=3, eval_mode=False),
    "plane": lambda m, f, d: landscape.plane(m, f, d, points=3),
    "path": lambda m, f, d: landscape.interpolate(m, m, other(m), f, d, points=3),
    "ascent": lambda m, f, d: landscape.ascent_sharpness(m, f, d, steps=2),
    "gradient": lambda m, f, d: landscape.gradient_direction(m, f, d),
    "components": lambda m, f, d: landscape.principal_components(m, [m, other(m), other(m, 1)]),
    "distance": lambda m, f, d: landscape.parameter_distance(m, other(m)),
}


def other(model: nn.Module, seed: int = 0) -> nn.Module:
    kind = type(model)
    streams = torch.get_rng_state()
    torch.manual_seed(seed)
    made = kind() if kind is not nn.Sequential else model_of("mlp")
    torch.set_rng_state(streams)
    return made


def in_training(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model in the middle of a step, its gradients piling up."""
    model, data = model_of(kind), batches(kind, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in data:
        cross_entropy(model, batch).backward()
        optimizer.step()
    return model, optimizer, data[0]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind: str, look: str) -> None:
    model, optimizer, batch = in_training(kind)
    before = everything(model, optimizer)
    graph = cross_entropy(model, batch) if kind != "transformer" else None  # no dropout
    before |= {k: v for k, v in everything(model, optimizer).items() if "norm" in k or k == "torch"}
    gradients = [p.grad for p in model.parameters()]
    LOOKS[look](model, cross_entropy, batch)
    assert everything(model, optimizer) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    if graph is not None:
        graph.backward()  # the user's own graph is still valid


class Careless:
    """A loss function that changes all it can reach, and ends at a call in the way it is told."""

    def __init__(self, last: int, error: type[BaseException]) -> None:
        self.calls, self.last, self.error = 0, last, error

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(3)
        model.train(not model.training)
        if self.calls >= self.last:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
                    p.requires_grad_(False)
                for b in model.buffers():
                    b.add_(1)
            raise self.error("boom")
        return cross_entropy(model, batch)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("look", ["line", "plane", "path", "ascent"])
def test_nothing_changes_where_it_fails(look: str, last: int, error: type[BaseException]) -> None:
    model, optimizer, batch = in_training("conv")
    before = everything(model, optimizer)
    careless = Careless(last, error)
    with pytest.raises(error, match="boom"):
        LOOKS[look](model, careless, batch)
    assert careless.calls >= last
    assert everything(model, optimizer) == before


def test_a_point_does_not_depend_on_those_before_it() -> None:
    """Whatever a pass leaves behind in the model is put back before the next."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 4), 0
            self.total: Tensor
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.total += 1
            return self.layer(x) * self.calls * self.total

    model, [batch] = Counting(), batches("mlp", 1)
    line = landscape.line(model, cross_entropy, batch, points=3)
    part = landscape.line(model, cross_entropy, batch, points=2, between=(0.0, 1.0))
    assert line.losses[1:].tolist() == part.losses.tolist()
    assert model.calls == 0 and model.total == 0
