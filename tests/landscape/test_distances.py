"""Distances between weights against closed forms."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dyndiag import landscape
from dyndiag.errors import DyndiagError
from tests.landscape.made import cross_entropy, network, task, trained
from tests.models import ConvNet, Transformer


def test_a_distance_by_hand() -> None:
    a = {"one.w": torch.tensor([3.0, 4.0]), "two.w": torch.tensor([0.0, 0.0])}
    b = {"one.w": torch.tensor([3.0, 0.0]), "two.w": torch.tensor([0.0, 3.0])}
    found = landscape.parameter_distance(a, b)
    assert (found.l2, found.relative, found.size) == (5.0, 1.0, 4)
    assert found.cosine == pytest.approx(9 / (5 * math.sqrt(18)))
    assert found.modules["one"].relative == pytest.approx(0.8)
    assert found.modules["one"].cosine == pytest.approx(0.6)
    assert found.modules["two"].relative == math.inf and math.isnan(found.modules["two"].cosine)


@given(scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_a_multiple_of_the_weights(scale: float, shift: float) -> None:
    a = network(0, 8).state_dict()
    found = landscape.parameter_distance(a, {name: shift * t for name, t in a.items()})
    assert found.relative == pytest.approx(abs(shift - 1), rel=1e-5, abs=1e-6)
    if abs(shift) > 1e-3:
        assert found.cosine == pytest.approx(math.copysign(1.0, shift), abs=1e-6)


def test_parts_make_up_the_whole() -> None:
    found = landscape.parameter_distance(network(0), network(1))
    assert set(found.modules) == {"0", "2", "4"}
    assert sum(part.l2**2 for part in found.modules.values()) == pytest.approx(found.l2**2)
    assert sum(part.size for part in found.modules.values()) == found.size


def test_only_parameters_count_and_tied_ones_once() -> None:
    a, b = ConvNet(), ConvNet()
    with torch.no_grad():
        b.load_state_dict(a.state_dict())
        for statistics in b.norm.buffers():
            statistics.add_(5)
    forms: list[tuple[Any, Any]] = [(a, b), (a.state_dict(), b.state_dict()), (a.state_dict(), b)]
    for one, other in forms:
        assert landscape.parameter_distance(one, other).l2 == 0.0
    tied = Transformer(vocabulary=16)
    tied.head.weight = tied.embed.weight
    moved = copy.deepcopy(tied)
    with torch.no_grad():
        moved.embed.weight.add_(1)
    forms = [(tied, moved), (tied.state_dict(), moved.state_dict())]
    for one, other in forms:
        assert landscape.parameter_distance(one, other).l2 == pytest.approx(16.0)


def test_two_runs_of_one_start_stay_nearer_than_two_starts(tmp_path: Path) -> None:
    data = task()
    runs = [trained(network(start), data, 60, seed) for start, seed in ((0, 0), (0, 1), (1, 0))]
    torch.save(runs[1].state_dict(), tmp_path / "second.pt")
    near = landscape.parameter_distance(runs[0], tmp_path / "second.pt")
    far = landscape.parameter_distance(runs[0], runs[2])
    assert near.relative < 0.5 < far.relative and near.cosine > 0.9 > far.cosine
    line = landscape.difference(runs[0], runs[0], runs[1])
    assert line.norm == pytest.approx(near.l2, rel=1e-6)
    assert cross_entropy(runs[0], data) < 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    a = {"w": torch.ones(2)}
    with pytest.raises(DyndiagError, match=r"'w' has shape \(2,\) in a and \(3,\) in b"):
        landscape.parameter_distance(a, {"w": torch.ones(3)})
    with pytest.raises(DyndiagError, match="'v' is in only one of them, and so are 1 more"):
        landscape.parameter_distance(a, {"v": torch.ones(2)})
    with pytest.raises(DyndiagError, match="no weights of floating point"):
        landscape.parameter_distance({"n": torch.arange(2)}, {"n": torch.arange(2)})
    with pytest.raises(DyndiagError, match="b does not fit"):
        landscape.parameter_distance(nn.Linear(2, 2), nn.Linear(2, 3))
