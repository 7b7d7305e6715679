"""The gradient in the top eigenspace: against dense Hessians, and at the edge of stability."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyndiag.batches import MicroBatches
from dyndiag.errors import DyndiagError
from dyndiag.probes.gradients.cosines import Cosines
from dyndiag.probes.gradients.top_space import TopSpace
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from tests.models import batches, cross_entropy, mlp
from tests.probes.stepping import row, take

EVERY = Every(1)


def state_of(model: nn.Module, loss_fn: Any, batch: Any, step: int = 0) -> TrainState:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    data = MicroBatches((batch,))
    names, parameters = tuple(n for n, _ in named), tuple(p for _, p in named)
    return TrainState(step, model, optimizer, parameters, names, loss_fn, data, data, (0.1,))


def dense(state: TrainState) -> tuple[Tensor, Tensor]:
    """Hessian and gradient, entry by entry."""
    gradient = torch.autograd.grad(state.probe_loss(), state.parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, state.parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows]), flat.detach()


@pytest.mark.parametrize("k", [1, 4])
def test_against_the_dense_hessian(k: int) -> None:
    torch.manual_seed(0)
    model = mlp(6).double()
    x, y = batches("mlp", 1)[0]
    state = state_of(model, cross_entropy, (x.double(), y))
    probe = TopSpace(k, EVERY)
    spaces = []
    for sample in range(2):
        hessian, gradient = dense(state)
        vectors = torch.linalg.eigh(hessian).eigenvectors.flip(1)[:, :k]
        spaces.append(vectors)
        seen = row(probe.measure(state))
        share = (vectors.T @ gradient).square().sum() / gradient.square().sum()
        # A vector is off by its residual over its gap: 1 % of the value over some tenths of it.
        assert seen["gradients/top_space_share"] == pytest.approx(share.item(), abs=0.02)
        assert seen["gradients/top_space_share.converged"] == 1
        assert seen["gradients/top_space_share.products"] > k
        assert seen["gradients/top_space_chance"] == k / 82
        parts = {n: v for n, v in seen.items() if n.startswith("curvature/participation")}
        assert sum(parts.values()) == pytest.approx(1, rel=1e-12)
        of_first = vectors[: 8 * 6 + 6, 0].square().sum().item()
        assert parts["curvature/participation/0"] == pytest.approx(of_first, abs=0.02)
        if sample == 1:
            expected = (spaces[0].T @ spaces[1]).square().sum().item() / k
            assert 0.1 < expected < 0.95
            assert seen["curvature/top_space_overlap"] == pytest.approx(expected, abs=0.03)
        else:
            assert "curvature/top_space_overlap" not in seen
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)


class Quadratic(nn.Module):
    """½ Σ λᵢ θᵢ², by parts."""

    def __init__(self, *values: list[float]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(len(v), 1, bias=False) for v in values)
        self.values = [torch.tensor(v) for v in values]

    def forward(self, batch: Tensor) -> Tensor:
        weights = [part.weight for part in self.parts if isinstance(part, nn.Linear)]
        return torch.stack(
            [(0.5 * v * w.square()).sum() for v, w in zip(self.values, weights, strict=True)]
        ).sum()


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch)
    return found


def test_a_diagonal_quadratic() -> None:
    model = Quadratic([9.0, 1.0, 0.5], [4.0, 0.25])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    state = state_of(model, quadratic, torch.zeros(1))
    seen = row(TopSpace(2).measure(state))
    whole = 9**2 + 1 + 0.5**2 + 4**2 + 0.25**2
    assert seen["gradients/top_space_share"] == pytest.approx((81 + 16) / whole, rel=1e-5)
    assert seen["curvature/participation/parts.0"] == pytest.approx(1, rel=1e-5)
    assert seen["curvature/participation/parts.1"] == pytest.approx(0, abs=1e-5)


def test_a_space_larger_than_the_model_is_everything() -> None:
    model = Quadratic([9.0, 1.0])
    seen = row(TopSpace().measure(state_of(model, quadratic, torch.zeros(1))))
    assert seen["gradients/top_space_chance"] == 1
    assert seen["gradients/top_space_share"] == pytest.approx(1, rel=1e-6)


def test_other_parameters_begin_anew() -> None:
    model = Quadratic([9.0, 1.0, 0.5], [4.0, 0.25, 0.1])
    probe = TopSpace(2)
    probe.measure(state_of(model, quadratic, torch.zeros(1)))
    model.parts[0].requires_grad_(False)
    seen = row(probe.measure(state_of(model, quadratic, torch.zeros(1))))
    assert "curvature/top_space_overlap" not in seen
    assert [n for n in seen if "participation" in n] == ["curvature/participation/parts.1"]


def test_curvature_that_is_not_finite_is_not_converged() -> None:
    model = Quadratic([9.0, 1.0, 0.5])
    model.values[0][1] = torch.nan
    probe = TopSpace(2)
    seen = row(probe.measure(state_of(model, lambda m, b: m(b).nan_to_num(), torch.zeros(1))))
    assert seen["gradients/top_space_share.converged"] == 0
    model.values[0][1] = 1.0
    seen = row(probe.measure(state_of(model, quadratic, torch.zeros(1))))
    assert seen["gradients/top_space_share.converged"] == 1
    assert "curvature/top_space_overlap" not in seen


@pytest.mark.parametrize("k", [0, 1.5, True, EVERY])
def test_what_is_no_number_of_eigenvectors(k: Any) -> None:
    with pytest.raises(DyndiagError, match="k must be a number of eigenvectors, 1 or more"):
        TopSpace(k)


def test_nothing_to_measure_on() -> None:
    model = mlp()
    state = state_of(model, None, batches("mlp", 1)[0])
    assert not TopSpace().applies(state)


class Chebyshev(nn.Module):
    """1-100-1 with tanh, for a Chebyshev polynomial on 20 points."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 100), nn.Linear(100, 1, bias=False)
        nn.init.xavier_normal_(self.first.weight, 1.9)
        nn.init.zeros_(self.first.bias)
        nn.init.xavier_normal_(self.last.weight, 1.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def half_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def test_at_the_edge_of_stability_the_gradient_hops_along_the_top_direction() -> None:
    torch.manual_seed(0)
    model = Chebyshev().double()
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    batch = x, 8 * x**4 - 8 * x**2 + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    cosines, top = Cosines(), TopSpace(1, EVERY)
    shares, turns = {}, {}
    for step in range(1400):
        optimizer.zero_grad()
        half_squared_error(model, batch).backward()
        seen = take(cosines, model, optimizer, step)
        if seen:
            found = row(top.measure(state_of(model, half_squared_error, batch, step)))
            shares[step] = found["gradients/top_space_share"]
            turns[step] = seen["gradients/cosine_previous"]
            assert found["gradients/top_space_share.converged"] == 1

    def of(values: dict[int, float], first: int, last: int) -> list[float]:
        return [value for step, value in values.items() if first <= step < last]

    assert max(of(shares, 100, 350)) < 0.01 and min(of(turns, 100, 350)) > 0.9
    assert np.median(of(shares, 900, 1400)) > 0.5
    hops = [turns[step] for step in turns if shares[step] > 0.95]
    assert len(hops) > 10 and np.median(hops) < -0.95
    assert np.median(of(turns, 900, 1400)) < -0.5
