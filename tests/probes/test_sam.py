"""SAM's own edge ratio, and runs in which it means something and in which it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import dyndiag
from dyndiag.batches import MicroBatches
from dyndiag.optimizers import sam_threshold
from dyndiag.probes.curvature.sam import SAMRatio
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from dyndiag.values import Estimate
from tests.sam import SAM, USAM

CURVATURE = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.02, 0.3, 0.4], dtype=torch.float64))


def quadratic(model: Any, batch: Tensor) -> Tensor:
    return (0.5 * batch * model.theta.square()).sum()


def step(optimizer: Any, model: nn.Module, loss_fn: Any, batch: Any) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model, batch)
        loss.backward()
        return loss

    taken: Tensor = optimizer.step(closure)
    return taken


def measured(optimizer: Optimizer, model: Point) -> dict[str, float]:
    data = MicroBatches((CURVATURE,))
    rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
    here = TrainState(0, model, optimizer, (model.theta,), ("theta",), quadratic, data, data, rates)
    probe = SAMRatio(Every(1))
    if not probe.applies(here):
        return {}
    found: dict[str, float] = {}
    for name, value in probe.measure(here).items():
        found |= value.columns(str(name)) if isinstance(value, Estimate) else {str(name): value}  # type: ignore[dict-item]
    for i, text in enumerate(probe.notices):
        found[f"notice {i}: {text}"] = 0.0
    return found


def test_un_normalised_over_heavy_ball_with_decay() -> None:
    model = Point()
    optimizer = USAM(model.parameters(), SGD, rho=0.2, lr=0.1, momentum=0.9, weight_decay=0.5)
    step(optimizer, model, quadratic, CURVATURE)
    found = measured(optimizer, model)
    assert found["stability/sam_ratio"] == pytest.approx(0.05 / 1.9 * (5 * (1 + 0.2 * 5) + 0.5))
    assert found["stability/sam_base_ratio"] == pytest.approx(0.05 / 1.9 * 5.5)
    at = found["stability/sam_threshold"]
    assert 0.05 / 1.9 * (at * (1 + 0.2 * at) + 0.5) == pytest.approx(1.0)
    assert found["stability/sam_ratio.converged"] == 1
    assert found["stability/sam_ratio.upper_bound"] >= found["stability/sam_ratio"] * (1 - 1e-9)


def test_over_adam_by_the_operator() -> None:
    model = Point()
    optimizer = USAM(model.parameters(), Adam, rho=0.2, lr=0.1)
    step(optimizer, model, quadratic, CURVATURE)
    state = optimizer.base_optimizer.state[model.theta]
    p = 0.1 * ((state["exp_avg_sq"] / 0.001).sqrt() + 1e-8)  # 1 − β₁ = .1 at the first step
    exact = 0.5 * 0.1 * (0.1 / 1.9) * (CURVATURE * (1 + 0.2 * CURVATURE) / p).max()
    found = measured(optimizer, model)
    assert found["stability/sam_ratio"] == pytest.approx(float(exact), rel=1e-6)
    assert set(found) == {key for key in found if key.startswith("stability/sam_ratio")}


def test_normalised_by_the_gradient_of_the_probe_batch() -> None:
    model = Point()
    optimizer = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
    step(optimizer, model, quadratic, CURVATURE)
    norm = float((CURVATURE * model.theta.detach()).norm())
    found = measured(optimizer, model)
    assert found["stability/sam_ratio"] == pytest.approx(0.25 * (1 + 0.05 / norm * 5))
    assert found["stability/sam_threshold"] == pytest.approx(sam_threshold(0.1, 0.05 / norm))
    with torch.no_grad():
        model.theta.zero_()
    found = measured(optimizer, model)  # no gradient, no bound on its radius
    assert found["stability/sam_ratio"] == math.inf
    assert found["stability/sam_base_ratio"] == pytest.approx(0.25)
    assert "stability/sam_threshold" not in found


def test_what_is_no_sam_or_not_known() -> None:
    model = Point()
    assert measured(SGD(model.parameters(), lr=0.1), model) == {}
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    optimizer.param_groups[0]["adaptive"] = True
    (notice,) = measured(optimizer, model)
    assert "no stability/sam_ratio: SAM scales its radius by the weights" in notice


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1).mean()


def network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return model, (x, torch.sin(3 * x[:, :2]))


def test_it_sharpens_to_its_own_edge_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 2/η, where descent's own edge is; and no edge event, for the base's ratio is not 1."""
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.2)  # of the other probes' passes
    model, batch = network()
    rate, radius, steps = 0.3, 0.25, 750
    optimizer = USAM(model.parameters(), SGD, rho=radius, lr=rate)
    with dyndiag.Monitor(
        model, optimizer, squared, run=tmp_path / "run", probes=[SAMRatio(Every(25))],
        tensorboard=False,
    ) as monitor:  # fmt: skip
        for _ in range(steps):
            loss = step(optimizer, model, squared, batch)
            monitor.step(loss=loss, batch=batch)
    run = dyndiag.Run(tmp_path / "run")
    ratio, base = run["stability/sam_ratio"], run["stability/sam_base_ratio"]
    late = ratio.index >= 550
    assert ratio.iloc[0] < 0.6
    assert ratio[late].between(0.95, 1.05).all() and late.sum() >= 8
    assert base[late].between(0.5, 0.56).all()
    assert run["stability/sam_threshold"].iloc[0] == pytest.approx(sam_threshold(rate, radius))
    assert "stability/edge_ratio" not in run.names
    assert "edge_of_stability" not in set(run.events["kind"])


def test_normalised_on_a_quadratic_it_comes_to_one_by_itself_and_opens_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.2)
    model = Point()
    optimizer = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
    with dyndiag.Monitor(
        model, optimizer, quadratic, run=tmp_path / "run", probes=[SAMRatio(Every(7))],
        tensorboard=False,
    ) as monitor:  # fmt: skip
        for _ in range(300):
            loss = step(optimizer, model, quadratic, CURVATURE)
            monitor.step(loss=loss, batch=CURVATURE)
    run = dyndiag.Run(tmp_path / "run")
    assert run["stability/sam_ratio"].iloc[-10:].mean() == pytest.approx(1.0, abs=0.02)
    assert run["stability/sam_base_ratio"].max() == pytest.approx(0.25)  # and descent is safe
    assert "edge_of_stability" not in set(run.events["kind"])


@pytest.mark.parametrize("kind", [SAM, USAM])
def test_leaves_no_trace(kind: type[SAM], tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        model, batch = network()
        optimizer = kind(model.parameters(), SGD, rho=0.05, lr=0.1, momentum=0.9)
        monitor = (
            dyndiag.Monitor(
                model, optimizer, squared, run=tmp_path / "run", probes=[SAMRatio(Every(3))]
            )
            if watched
            else None
        )
        for _ in range(20):
            loss = step(optimizer, model, squared, batch)
            if monitor is not None:
                monitor.step(loss=loss, batch=batch)
        if monitor is not None:
            monitor.close()
        ends.append([p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert len(dyndiag.Run(tmp_path / "run")["stability/sam_ratio"]) == 7
