"""ζ, by which a step is told too long, on quadratics where it is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import MicroBatches
from dyndiag.curvature import realised_edge
from dyndiag.probes.curvature.realised_edge import RealisedEdge
from dyndiag.schedule import Every
from dyndiag.state import TrainState

HESSIAN = torch.tensor([4.0, 1.0], dtype=torch.float64)


def quadratic(theta: Tensor, curvature: Tensor = HESSIAN) -> Tensor:
    return (0.5 * curvature * theta.square()).sum()


def zeta(theta: Tensor, change: Tensor) -> float:
    promised = (HESSIAN * theta * change).sum()
    return realised_edge(promised, quadratic(theta), quadratic(theta - change)).item()


def test_a_plain_gradient_step() -> None:
    theta = torch.ones(2, dtype=torch.float64)
    assert zeta(theta, 0.1 * HESSIAN * theta) == pytest.approx(0.19118, abs=5e-6)
    assert zeta(theta, 34 / 65 * HESSIAN * theta) == pytest.approx(1.0)  # the critical rate


NUMBERS = st.tuples(*[st.floats(-2, 2)] * 2)


@given(theta=NUMBERS, change=NUMBERS)
def test_above_one_if_and_only_if_the_loss_rose(
    theta: tuple[float, ...], change: tuple[float, ...]
) -> None:
    at, by = (torch.tensor(v, dtype=torch.float64) for v in (theta, change))
    value, promised = zeta(at, by), (HESSIAN * at * by).sum().item()
    if promised <= 0:
        assert value != value
    else:
        exact = 0.5 * (HESSIAN * by * by).sum().item() / promised  # ½ ΔᵀHΔ / gᵀΔ
        assert value == pytest.approx(exact, rel=1e-6, abs=1e-12 / promised)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2))


def loss(model: Any, batch: Tensor) -> Tensor:
    assert not model.training
    return quadratic(model.theta, batch)


def measured(optimizer_class: type[torch.optim.Optimizer], rate: float) -> dict[str, float]:
    model = Point()
    optimizer = optimizer_class(model.parameters(), lr=rate)  # type: ignore[call-arg]
    before = (model.theta.detach().clone(),)
    quadratic(model.theta, HESSIAN.float()).backward()
    optimizer.step()
    state = TrainState(
        0, model, optimizer, (model.theta,), ("theta",), loss_fn=loss,
        batch=MicroBatches((HESSIAN.float(),)), learning_rates=(rate,), weights_before=before,
    )  # fmt: skip
    probe = RealisedEdge(Every(1))
    assert probe.applies(state)
    return {str(name): float(value) for name, value in probe.measure(state).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0])
def test_adams_first_step(rate: float) -> None:
    # Its first step is `rate` along every axis: ζ = ½ · rate · (4 + 1) / (4 + 1).
    found = measured(torch.optim.Adam, rate)
    assert found["stability/realised_edge"] == pytest.approx(rate / 2, rel=1e-5)


def test_not_where_a_frozen_preconditioner_tells_it_all() -> None:
    assert measured(torch.optim.SGD, 0.1) == {}


def test_only_early_and_where_the_weights_before_were_kept() -> None:
    model = Point()
    optimizer = torch.optim.Adam(model.parameters())
    common: dict[str, Any] = {"loss_fn": loss, "batch": MicroBatches((HESSIAN,))}
    late, unkept = (
        TrainState(step, model, optimizer, (), (), weights_before=kept, **common)
        for step, kept in ((100, ()), (0, None))
    )
    probe = RealisedEdge(Every(1))
    assert not probe.applies(late)
    assert not probe.applies(unkept)
