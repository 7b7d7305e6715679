"""Where gradient flow would end: the scalar network's closed form, and the integrator by itself."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import chebyshev, eigenpairs, hessian
from dyndiag.curvature.gradient_flow import gradient_flow_sharpness
from dyndiag.errors import DyndiagError

ONE = torch.ones(1, dtype=torch.float64)


class Scalars(nn.Module):
    """½(∏w − 1)²: flow keeps each wᵢ² − wⱼ²."""

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.prod()

    def hessian(self) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            return 0.5 * (w.prod() - 1) ** 2

        found: Tensor = torch.autograd.functional.hessian(loss, self.w.detach())
        return found

    def truth(self) -> float:
        """Σ 1/(wᵢ² + c), c the root of ∏√(wᵢ² + c) = 1."""
        squares = self.w.detach().numpy() ** 2
        low, high = -squares.min(), 10.0
        for _ in range(100):
            c = (low + high) / 2
            low, high = (c, high) if np.prod(squares + c) < 1 else (low, c)
        return float((1 / (squares + c)).sum())


def to_one(model: nn.Module, batch: Tensor) -> Tensor:
    return 0.5 * (model(batch) - 1).square().mean()


@pytest.mark.parametrize("w", [(2.0, 0.3, 1.5, 0.2), (3.0, -0.5, 0.1, 2.0), (0.5, 0.5, 0.1)])
def test_scalar_network(w: tuple[float, ...]) -> None:
    model = Scalars(*w)
    found = gradient_flow_sharpness(model, to_one, ONE, tolerance=1e-5)
    assert found.converged
    assert found.value == pytest.approx(model.truth(), rel=1e-3)
    assert found.loss < 1e-8 and found.gradient_norm < 1e-3 and found.time > 0
    assert model.w.tolist() == list(w) and model.w.grad is None


def test_at_a_minimum_it_is_the_sharpness() -> None:
    model = Scalars(2.0, 0.5, 1.0)
    found = gradient_flow_sharpness(model, to_one, ONE)
    assert found.gradients < 30 and found.time == found.distance == 0
    assert found.value == pytest.approx(1 / 4 + 4 + 1, rel=1e-6)
    assert found.converged and found.change == 0


def test_a_flow_that_ends_while_the_sharpness_still_moves_has_not_converged() -> None:
    model = Scalars(2.0, 0.3, 1.5, 0.2)
    found = gradient_flow_sharpness(model, to_one, ONE, gradient_tolerance=0.02)
    assert found.gradient_norm > 0.01 and found.gradients < 200  # ended, by what was asked for
    assert abs(found.change) > 0.01 * found.value and not found.converged


def test_along_descent_it_never_rises_though_the_sharpness_does() -> None:
    """The phenomenon: descent at the edge wears φ down to 2/η, while the sharpness swings."""
    rate = 0.2
    model = Scalars(2.5, 2.5, 0.3, 0.3)
    flows, sharpness, losses = [], [], []
    for step in range(101):
        loss = to_one(model, ONE)
        losses.append(loss.item())
        sharpness.append(float(torch.linalg.eigvalsh(model.hessian())[-1]))
        if step % 20 == 0:
            flows.append(gradient_flow_sharpness(model, to_one, ONE, tolerance=1e-5).value)
            assert flows[-1] == pytest.approx(model.truth(), rel=2e-3)
        (g,) = torch.autograd.grad(loss, model.w)
        with torch.no_grad():
            model.w.sub_(rate * g)
    assert all(b <= a * (1 + 1e-3) for a, b in pairwise(flows)), flows
    assert flows[0] == pytest.approx(12.953, rel=1e-3)
    assert 2 / rate < flows[-1] < 1.03 * 2 / rate
    assert sharpness[1] > sharpness[0] and any(b > a for a, b in pairwise(losses))


def squared(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()


def test_of_a_linear_model_it_is_the_sharpness_wherever_one_begins() -> None:
    """Stiff: eigenvalues from 0.2 to 100, in few gradients beside steps of 2/λ."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64) * torch.tensor([10.0, 3.0, 0.4]).double()
    y = x.sum(1, keepdim=True)
    model = nn.Linear(3, 1, bias=False).double()
    top = float(torch.linalg.eigvalsh(x.T @ x / 40)[-1])
    whole = gradient_flow_sharpness(model, squared, (x, y))
    loader: DataLoader[Any] = DataLoader(TensorDataset(x, y), batch_size=20)
    parts = gradient_flow_sharpness(model, squared, loader)
    for found in (whole, parts):
        assert found.converged and found.value == pytest.approx(top, rel=1e-4)
    assert whole.distance == pytest.approx(parts.distance, rel=1e-6)
    assert 2 * whole.gradients < whole.time * top / 2


def test_a_flow_without_an_end_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 3)
    model = nn.Linear(3, 2)
    labels = (x[:, 0] > 0).long()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found = gradient_flow_sharpness(model, loss, (x, labels), max_gradients=300, progress=True)
    assert not found.converged and 300 <= found.gradients < 600
    assert found.value < 0.5 * float(eigenpairs(hessian(model, loss, (x, labels))).values[0])
    assert "gradient flow" in capsys.readouterr().err


def test_leaves_no_trace_also_where_it_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    batch = (torch.randn(8, 3), torch.randn(8, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    held = [p.data_ptr() for p in model.parameters()]
    stream, calls = torch.get_rng_state(), 0

    def failing(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("boom")
        return squared(model, batch)

    gradient_flow_sharpness(model, squared, batch, max_gradients=40)
    with pytest.raises(RuntimeError, match="boom"):
        gradient_flow_sharpness(model, failing, batch)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == held
    assert torch.equal(torch.get_rng_state(), stream) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(DyndiagError, match="above 0"):
        gradient_flow_sharpness(Scalars(1.0, 2.0), to_one, ONE, tolerance=0.0)
    with pytest.raises(DyndiagError, match="16"):
        gradient_flow_sharpness(nn.Linear(2, 1).half(), squared, ONE)


@pytest.mark.parametrize("stages", [2, 5, 20, 200])
def test_a_chebyshev_step_is_stable_as_far_as_its_stages_reach(stages: int) -> None:
    """y' = −λy for λ up to the radius: |y| shrinks; of second order for a short one."""
    rates = torch.linspace(0, 1, 400, dtype=torch.float64)

    def field(y: Tensor) -> Tensor:
        return -rates * y

    h = 0.65 * (stages**2 - 1)
    y = torch.ones_like(rates)
    tried = chebyshev.step(field, y, field(y), h, 1.0)
    assert tried.stages <= stages + 1
    assert tried.y.abs().max() <= 1 + 1e-12
    errors = []
    for h in (0.2, 0.1):
        tried = chebyshev.step(field, y, field(y), h, 0.65 * (stages**2 - 1) / h)
        errors.append(float((tried.y - torch.exp(-rates * h)).abs().max()))
        assert tried.stages >= stages
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3.0, abs=0.2)
