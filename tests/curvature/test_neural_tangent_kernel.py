"""The kernel against a dense Jacobian and Gauss–Newton; the catapult that its eigenvalue tells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import eigenpairs, gauss_newton, trace
from dyndiag.curvature.neural_tangent_kernel import (
    neural_tangent_kernel,
    neural_tangent_kernel_sharpness,
)
from dyndiag.curvature.outputs import LossOfOutput
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import dense

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def squared(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()


def written_out(model: nn.Module) -> Tensor:
    weights = dict(model.named_parameters())
    of = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (X,)))(weights)
    jacobian = torch.cat([j.detach().flatten(2) for j in of.values()], 2).flatten(0, 1)
    return jacobian @ jacobian.T / len(X)


def test_against_the_jacobian_whatever_the_cut() -> None:
    model = net()
    truth = written_out(model)
    loader: DataLoader[Any] = DataLoader(TensorDataset(X, Y), batch_size=4)
    for options in ({"data": (X, Y)}, {"data": loader}, {"data": (X, Y), "micro_batch": 2}):
        kernel = neural_tangent_kernel(model, squared, **options)
        torch.testing.assert_close(dense(kernel), truth, rtol=1e-12, atol=1e-13)
    found = trace(neural_tangent_kernel(model, squared, (X, Y)))
    assert found.value == pytest.approx(float(truth.trace()))


def test_its_top_is_that_of_gauss_newton_of_half_squared_error() -> None:
    model = net()
    found = neural_tangent_kernel_sharpness(model, squared, (X, Y), k=3)
    other = eigenpairs(gauss_newton(model, squared, (X, Y)), k=3)
    assert found.converged
    torch.testing.assert_close(found.values, other.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(written_out(model)).flip(0)[:3], rtol=1e-5, atol=0
    )


def test_the_curvature_of_the_loss_has_no_part() -> None:
    model = net()
    kernel = neural_tangent_kernel(model, lambda m, b: m(b[0]).mean(), (X, Y))
    torch.testing.assert_close(dense(kernel), written_out(model), rtol=1e-12, atol=1e-13)


def test_a_product_is_one_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = neural_tangent_kernel(net(), squared, (X, Y))
    calls: list[str] = []
    for name in ("jacobian_product", "transposed_product"):
        real = getattr(LossOfOutput, name)

        def watched(batch: LossOfOutput, v: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(batch, v)

        monkeypatch.setattr(LossOfOutput, name, watched)
    found = eigenpairs(kernel)
    assert calls == ["transposed_product", "jacobian_product"] * found.products
    assert found.products <= kernel.size == 18


def test_what_is_refused_and_what_is_left() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)).double()
    stream, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    neural_tangent_kernel_sharpness(model, squared, (X, Y))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training
    with pytest.raises(DyndiagError, match="pass size="):
        neural_tangent_kernel(model, lambda m, b: squared(m, (X, Y)), None)


class TwoLayers(nn.Module):
    """f = vᵀu x/√m, whose kernel on the one example x = 1 is (‖u‖² + ‖v‖²)/m."""

    def __init__(self, kernel: float, m: int = 500, seed: int = 0) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        u, v = random.normal(size=m), random.normal(size=m)
        scale = math.sqrt(kernel / ((u @ u + v @ v) / m))
        self.u, self.v = (nn.Parameter(torch.tensor(scale * w)) for w in (u, v))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.v @ self.u) / math.sqrt(len(self.u))


def run(start: float, rate: float = 1.0, steps: int = 1500) -> tuple[float, float, float]:
    """ηλ before and after, and the largest loss over the first."""
    model, example = TwoLayers(start / rate), (torch.ones(1, 1).double(), torch.zeros(1, 1))
    before = float(neural_tangent_kernel_sharpness(model, squared, example).values[0])
    losses: list[float] = []
    for _ in range(steps):
        loss = squared(model, example)
        losses.append(loss.item())
        if not losses[-1] < 1e12:
            return rate * before, math.nan, math.inf
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), slopes, strict=True):
                p.sub_(rate * g)
    after = float(neural_tangent_kernel_sharpness(model, squared, example).values[0])
    return rate * before, rate * after, max(losses) / losses[0]


@pytest.mark.parametrize(
    ("start", "ends_at", "within"), [(1.9, 1.90, 0.01), (2.2, 1.77, 0.02), (3.0, 0.20, 0.02)]
)
def test_catapult(start: float, ends_at: float, within: float) -> None:
    """Lazy below 2; between 2 and 4 the loss spikes and the kernel ends below 2."""
    before, after, spike = run(start)
    assert before == pytest.approx(start, rel=1e-9)
    assert after == pytest.approx(ends_at, abs=within)
    assert (spike > 10) is (start > 2)


def test_catapult_close_to_four_and_above() -> None:
    assert run(3.8)[1] < 2
    assert math.isnan(run(4.2)[1])
