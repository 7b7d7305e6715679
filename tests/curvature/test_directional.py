"""Curvature along a direction is what closed forms and dense Hessians say, for one product."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.curvature import LossHessian, eigenpairs, hessian, loss_hessian, scaled
from dyndiag.curvature.directional import (
    batch_sharpness,
    curvature_along,
    directional_sharpness,
    realised_edge,
)
from dyndiag.errors import DyndiagError
from tests.oracles.networks import PROBLEMS, cross_entropy, dense_hessian, mlp
from tests.oracles.spectra import counted, of_diagonal

H = torch.tensor([4.0, 1.0], dtype=torch.float64)


def quadratic(*theta: float, diagonal: Tensor = H) -> LossHessian:
    """½θᵀ diag(4, 1) θ."""
    at = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
    return loss_hessian(lambda: (diagonal * at.square()).sum() / 2, [at])


class TestClosedForms:
    def test_a_plain_gradient_step(self) -> None:
        loss = quadratic(1, 1)
        assert directional_sharpness(loss, loss.gradient).item() == pytest.approx(65 / 17)
        assert batch_sharpness(loss).item() == pytest.approx(65 / 17)

    def test_along_each_axis(self) -> None:
        loss = quadratic(1, 1)
        for axis, curvature in zip(torch.eye(2, dtype=torch.float64), H, strict=True):
            assert curvature_along(loss, axis) == curvature
            assert directional_sharpness(loss, axis) == pytest.approx(1.0)  # λ / (λ · 1)

    def test_the_realised_edge_of_a_step(self) -> None:
        theta, rate = torch.ones(2, dtype=torch.float64), 0.1
        step = rate * H * theta
        before, after = ((H * at.square()).sum() / 2 for at in (theta, theta - step))
        found = realised_edge((H * theta * step).sum(), before, after)
        assert found.item() == pytest.approx(0.19118, abs=5e-6)
        assert found.item() == pytest.approx(rate * 65 / 17 / 2)

    def test_of_a_preconditioned_step(self) -> None:
        """Γ·hᵀP^-½HP^-½h/hᵀh with h = P^-½g: at most λ₁, and the same as along Δ = ΓP⁻¹g."""
        loss, momentum_factor = quadratic(1, 3), 0.5
        p = torch.tensor([0.5, 2.0], dtype=torch.float64)
        g = torch.tensor([4.0, 3.0], dtype=torch.float64)
        h = g / p.sqrt()
        expected = momentum_factor * (h * H / p * h).sum() / (h * h).sum()
        root = (momentum_factor / p).sqrt()
        preconditioned = scaled(loss, root)
        found = curvature_along(preconditioned, root * loss.gradient)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            directional_sharpness(loss, momentum_factor * g / p), expected, rtol=1e-12, atol=0
        )
        assert found < eigenpairs(preconditioned).values[0] == pytest.approx(4.0)

    def test_batch_sharpness_of_least_squares_one_row_at_a_time(self) -> None:
        """½(xᵀθ − y)²: gᵀHg/gᵀg = ‖x‖² at every θ off the optimum, so its mean is tr H."""
        rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
        model = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.3, -0.8]]))
        each = [
            batch_sharpness(hessian(model, lambda m, x: (m(x) - 1).square().sum() / 2, row))
            for row in rows
        ]
        assert torch.stack(each).mean().item() == pytest.approx(7 / 3)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_the_dense_hessian(name: str) -> None:
    problem = PROBLEMS[name]()
    matrix = dense_hessian(problem)
    operator = hessian(problem.model, problem.loss_fn, problem.batch)
    g = operator.gradient
    d = torch.randn(len(g), generator=torch.Generator().manual_seed(1), dtype=g.dtype)
    d = d if d @ g > 0 else -d
    tolerance = {"rel": 1e-6, "abs": 1e-8 * matrix.norm().item()}
    assert batch_sharpness(operator).item() == pytest.approx(
        (g @ matrix @ g / (g @ g)).item(), **tolerance
    )
    assert directional_sharpness(operator, d).item() == pytest.approx(
        (d @ matrix @ d / (d @ g)).item(), rel=1e-6, abs=1e-8 * (matrix.norm() / (d @ g)).item()
    )


NUMBERS = st.floats(-1e3, 1e3)
VECTORS = st.lists(NUMBERS, min_size=4, max_size=4).filter(lambda v: max(map(abs, v)) > 1e-3)


@given(spectrum=VECTORS, direction=VECTORS, length=st.sampled_from([1e-200, -1.0, 1e200]))
def test_a_rayleigh_quotient_lies_in_the_spectrum_whatever_the_length(
    spectrum: list[float], direction: list[float], length: float
) -> None:
    operator, d = of_diagonal(spectrum), vector(direction)
    found = curvature_along(operator, d * length)
    slack = 1e-12 * max(map(abs, spectrum))
    assert min(spectrum) - slack <= found <= max(spectrum) + slack
    assert abs(found - curvature_along(operator, d)) <= slack


def vector(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(theta=VECTORS, update=VECTORS, multiple=st.sampled_from([0.125, 1.0, 1024.0]))
def test_a_multiple_of_the_update_scales_it_and_an_uphill_one_has_none(
    theta: list[float], update: list[float], multiple: float
) -> None:
    curvatures = vector([4.0, 1.0, 0.5, -2.0])
    loss, step = quadratic(*theta, diagonal=curvatures), vector(update)
    promised = (step * curvatures * vector(theta)).sum()
    found = directional_sharpness(loss, multiple * step)
    if abs(promised) < 1e-9 * step.norm() * vector(theta).norm():
        return  # its sign is rounding
    if promised < 0:
        assert math.isnan(found)
    else:
        curved = multiple * (step * curvatures * step).sum() / promised
        slack = 1e-9 * multiple * step.square().sum() / promised
        assert abs(found - curved) <= 1e-9 * abs(curved) + slack


def test_two_over_it_is_where_the_loss_of_a_network_stops_falling() -> None:
    """To second order: so exactly, in the limit of small steps, ζ = ½η·λ_dir."""
    problem = PROBLEMS["mlp, cross-entropy"]()
    operator = hessian(problem.model, problem.loss_fn, problem.batch)
    g, rate = operator.gradient, 1e-3
    expected = rate / 2 * directional_sharpness(operator, g)
    weights = nn.utils.parameters_to_vector(problem.model.parameters()).detach()
    nn.utils.vector_to_parameters(weights - rate * g, problem.model.parameters())
    after = problem.loss_fn(problem.model, problem.batch).detach()
    edge = realised_edge(rate * g @ g, g.new_tensor(operator.loss), after)
    assert edge.item() == pytest.approx(expected.item(), rel=0.01)


def test_one_product_each() -> None:
    loss, calls = counted(quadratic(1, 2))
    assert isinstance(loss, LossHessian)
    measures: list[Callable[[], Tensor]] = [
        lambda: curvature_along(loss, loss.gradient),
        lambda: batch_sharpness(loss),
        lambda: directional_sharpness(loss, loss.gradient),
    ]
    for measure in measures:
        before = len(calls)
        found = measure()
        assert len(calls) == before + 1
        assert found.shape == () and found.dtype is torch.float64


def test_float32_sums_are_exact_enough() -> None:
    """Summed in float32 from one end to the other, 10⁶ ones and a half would lose digits."""
    n = 1_000_001
    scales = torch.linspace(0.5, 1.5, n)
    operator = loss_hessian(
        lambda: (scales * at.square()).sum() / 2, [at := nn.Parameter(torch.ones(n))]
    )
    assert operator.dtype is torch.float32
    exact = scales.double().pow(3).sum() / scales.double().square().sum()
    assert batch_sharpness(operator).item() == pytest.approx(exact.item(), rel=2e-7)


def test_where_there_is_nothing_to_divide_by() -> None:
    at_the_optimum = quadratic(0, 0)
    assert math.isnan(batch_sharpness(at_the_optimum))
    assert math.isnan(directional_sharpness(at_the_optimum, torch.ones(2)))
    assert math.isnan(curvature_along(quadratic(1, 1), torch.zeros(2)))
    assert math.isnan(directional_sharpness(quadratic(1, 1), -torch.ones(2)))
    assert math.isnan(realised_edge(*torch.tensor([-1.0, 5.0, 3.0])))


def test_a_direction_of_another_shape_is_refused() -> None:
    model = mlp()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = hessian(model, cross_entropy, (x, torch.arange(5) % 3))
    parts = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(DyndiagError, match=r"shape \(73,\).*has shape \(7, 6\).*flatten"):
        curvature_along(operator, parts[0])
    with pytest.raises(DyndiagError, match=r"shape \(73,\).*has shape \(72,\)"):
        directional_sharpness(operator, torch.ones(72))
