"""Copies that begin beside a network: how they part, by a closed form, and early against late."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyndiag import landscape
from dyndiag.errors import DyndiagError
from tests.landscape.made import NOTHING, Weights, cross_entropy, network, task, trained


def descend(model: nn.Module, loss_fn: Any, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, NOTHING).backward()
        optimizer.step()


@pytest.mark.parametrize("curvature, factor", [(0.5, 0.95**10), (30.0, 2.0**10)])
def test_on_a_quadratic_it_grows_by_what_a_step_multiplies(curvature: float, factor: float) -> None:
    """|1 − ηλ|^T, in every direction where all curvatures are equal: calm below 2/η alone."""

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return curvature / 2 * model.t.square().sum()

    model = Weights(3.0, -4.0)
    found = landscape.butterfly(
        model, lambda m: descend(m, loss_fn, 10, 0.1), loss_fn, NOTHING, relative=1e-3, copies=3
    )
    assert found.start == pytest.approx(5e-3)
    assert found.growth == pytest.approx([factor] * 3, rel=1e-6)
    assert found.barriers == pytest.approx([0.0] * 3, abs=1e-6 * found.paths[0].losses.max())
    assert len(set(found.distances)) == 3  # three directions


def test_a_change_early_in_training_parts_networks_more_than_late() -> None:
    data = task()

    def train(model: nn.Sequential) -> None:
        model.load_state_dict(trained(model, data, 150, seed=0).state_dict())

    early = landscape.butterfly(network(0), train, cross_entropy, data, relative=0.05)
    late = landscape.butterfly(
        trained(network(0), data, 300, seed=1), train, cross_entropy, data, relative=0.05
    )
    assert early.growth[0] > 2 * late.growth[0]


def test_the_same_start_comes_to_the_same_end_and_nothing_changes() -> None:
    """Training draws from the global stream, and each copy meets the same draws."""
    data, model = task(32), network(0)

    def train(model: nn.Sequential) -> None:
        model.load_state_dict(trained(model, data, 3, int(torch.randint(1000, ()))).state_dict())

    before, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = landscape.butterfly(model, train, cross_entropy, data, relative=0.0, copies=2)
    assert found.distances.tolist() == found.barriers.tolist() == [0.0, 0.0]
    assert torch.equal(torch.get_rng_state(), streams)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_is_wrong_is_said() -> None:
    for ask, says in (({"relative": -1.0}, "relative must be"), ({"copies": 0}, "copies must be")):
        with pytest.raises(DyndiagError, match=says):
            landscape.butterfly(Weights(1.0), lambda m: None, cross_entropy, NOTHING, **ask)
