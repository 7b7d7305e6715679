"""Entropy, divergence and instability of predictions against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import MicroBatches
from dyndiag.probes.predictions import (
    Predictions,
    correct_predictions,
    jensen_shannon_divergence,
    loss_and_logits,
)
from dyndiag.schedule import FixedInterval
from dyndiag.state import TrainState
from tests.models import batches, cross_entropy, mlp


def jsd(p: list[float], q: list[float]) -> float:
    return jensen_shannon_divergence(torch.tensor([p]).log(), torch.tensor([q]).log()).item()


@pytest.mark.parametrize(
    ("p", "q", "truth"),
    [
        ([0.9, 0.1], [0.5, 0.5], 0.101749),
        ([1.0, 0.0], [0.0, 1.0], math.log(2)),
        ([0.7, 0.3, 0.0], [0.0, 0.6, 0.4], 0.406716),
        ([0.2, 0.8], [0.2, 0.8], 0.0),
    ],
)
def test_divergence_of_known_distributions(p: list[float], q: list[float], truth: float) -> None:
    assert jsd(p, q) == pytest.approx(truth, abs=1e-6)
    assert jsd(q, p) == pytest.approx(truth, abs=1e-6)


LOGITS = st.lists(st.floats(-200, 200, width=32), min_size=5, max_size=5)


@given(a=LOGITS, b=LOGITS)
def test_divergence_is_symmetric_and_bounded(a: list[float], b: list[float]) -> None:
    p, q = torch.log_softmax(torch.tensor([a]), -1), torch.log_softmax(torch.tensor([b]), -1)
    forth = jensen_shannon_divergence(p, q).item()
    back = jensen_shannon_divergence(q, p).item()
    exact = jensen_shannon_divergence(p.double(), q.double()).item()
    assert 0 <= forth <= math.log(2) + 1e-7
    assert forth == pytest.approx(back, abs=1e-6)
    assert forth == pytest.approx(exact, abs=1e-5)


class Table(nn.Module):
    """Predicts the rows of a table of logits."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(rows))

    def forward(self, inputs: Tensor) -> Tensor:
        assert not self.training
        return self.logits[inputs]


def table_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(probe: Predictions, model: Table, step: int, loss_fn: Any = table_loss) -> Any:
    batch = (torch.arange(len(model.logits)), torch.zeros(len(model.logits), dtype=torch.long))
    state = TrainState(
        step, model, torch.optim.SGD(model.parameters(), lr=0.1), (model.logits,), ("logits",),
        loss_fn=loss_fn, probe=MicroBatches((batch,)),
    )  # fmt: skip
    return {name: float(value) for name, value in probe.measure(state).items()}


def log(rows: list[list[float]]) -> list[list[float]]:
    return torch.tensor(rows).log().tolist()


def test_the_series_of_two_samples() -> None:
    probe = Predictions(FixedInterval(0.1))
    interval = probe.due.interval
    first = measured(probe, Table(log([[0.9, 0.1], [0.5, 0.5]])), 0)
    assert set(first) == {"predictions/entropy", "predictions/loss"}
    second = measured(probe, Table(log([[0.5, 0.5], [0.5, 0.5]])), interval)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert first["predictions/entropy"] == pytest.approx((entropy + math.log(2)) / 2)
    assert first["predictions/loss"] == pytest.approx(-(math.log(0.9) + math.log(0.5)) / 2)
    assert second["predictions/entropy"] == pytest.approx(math.log(2))
    assert second["predictions/jsd"] == pytest.approx(0.101749 / 2, abs=1e-6)
    assert second["predictions/instability"] == pytest.approx(0.101749 / 2 + math.log(2), abs=1e-6)


def test_no_divergence_over_another_distance() -> None:
    probe = Predictions(FixedInterval(0.1))
    model = Table(log([[0.9, 0.1]]))
    measured(probe, model, 0)
    assert "predictions/jsd" not in measured(probe, model, probe.due.interval + 2)
    assert "predictions/jsd" in measured(probe, model, 2 * probe.due.interval + 2)


@given(rows=st.integers(1, 5000), classes=st.sampled_from([2, 3, 100]))
def test_means_do_not_depend_on_how_positions_are_cut(rows: int, classes: int) -> None:
    g = torch.Generator().manual_seed(rows)
    model = Table(torch.randn(rows, classes, generator=g).tolist())
    found = measured(Predictions(FixedInterval(0.1)), model, 0)["predictions/entropy"]
    p = torch.softmax(model.logits.detach().double(), -1)
    assert found == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)


def test_a_loss_made_of_derivatives_is_measured() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum()

    model, batch = mlp().eval(), batches("mlp", 1)[0]
    with torch.no_grad():
        loss, logits = loss_and_logits(model, penalised, MicroBatches((batch,)))
    assert loss is not None
    assert logits is not None
    assert loss.item() == pytest.approx(penalised(model, batch).item())
    assert not loss.requires_grad


def test_micro_batches_are_put_together() -> None:
    model, (x, y) = mlp().eval(), batches("mlp", 1)[0]
    parts = MicroBatches(((x[:2], y[:2]), (x[2:], y[2:])), (2 / 6, 4 / 6))
    loss, logits = loss_and_logits(model, cross_entropy, parts)
    assert loss is not None
    assert logits is not None
    assert loss.item() == pytest.approx(cross_entropy(model, (x, y)).item())
    assert torch.allclose(logits, model(x))


@pytest.mark.parametrize("targets", ["tuple", "dict"])
def test_right_predictions_are_counted_where_targets_count(targets: str) -> None:
    model = Table([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]).eval()
    x, y = torch.arange(3), torch.tensor([0, -100, 0])
    batch = (x, y) if targets == "tuple" else {"labels": y, "inputs": x}
    loss_fn = table_loss if targets == "tuple" else lambda m, b: m(b["inputs"]).sum()
    right, count = correct_predictions(model, loss_fn, batch)
    assert (int(right), count) == (1, 2)
