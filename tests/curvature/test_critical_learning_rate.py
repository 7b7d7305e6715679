"""The critical learning rate against closed forms, a fine grid, and the step it speaks of."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import hessian
from dyndiag.curvature.critical_learning_rate import (
    CriticalLearningRate,
    Crossing,
    critical_learning_rate,
    loss_along,
)
from dyndiag.curvature.directional import directional_sharpness
from dyndiag.errors import DyndiagError
from tests.oracles.networks import PROBLEMS, Problem, cross_entropy, mlp

WITHIN = 1 / 30  # of a bracket with 1 − low/high < 1/16, the middle is within 3.34 %


class TestClosedForms:
    def test_a_plain_gradient_step(self) -> None:
        """H = diag(4, 1), θ = (1, 1): η_c = 34/65, and λ_c = 65/17 is the curvature along g."""
        h = torch.tensor([4.0, 1.0], dtype=torch.float64)
        found = critical_learning_rate(lambda rate: (h * (1 - rate * h) ** 2).sum() / 2)
        assert found.outcome is Crossing.FOUND
        assert found.bracket[0] <= 34 / 65 <= found.bracket[1]
        assert found.value == pytest.approx(34 / 65, rel=WITHIN)
        assert found.critical_sharpness == pytest.approx(65 / 17, rel=WITHIN)

    @pytest.mark.parametrize("cubic", [-0.4, -0.2, 3.0])
    def test_a_cubic(self, cubic: float) -> None:
        """−η + η² + cη³ rises above 0 at the first root of 1 = η + cη²; below c = −¼ nowhere."""
        root = math.sqrt(max(0, 1 + 4 * cubic))
        exact = (-1 + root) / (2 * cubic) if root else math.inf
        found = critical_learning_rate(lambda rate: -rate + rate**2 + cubic * rate**3)
        assert found.value == pytest.approx(exact, rel=WITHIN)

    def test_the_last_value_makes_it_seven_forward_passes(self) -> None:
        def loss(rate: float) -> float:
            return (rate - 0.37) ** 2

        cold = critical_learning_rate(loss, learning_rate=1e-4)
        warm = critical_learning_rate(loss, last=cold.value * 1.3)
        assert cold.value == pytest.approx(0.74, rel=WITHIN)
        assert warm.value == pytest.approx(0.74, rel=WITHIN)
        assert cold.forwards == 1 + 14 + 4  # 1e-4 · 2¹³ is the first rate above 0.74
        assert warm.forwards == 1 + 2 + 4

    def test_a_crossing_hit_exactly_is_no_rise(self) -> None:
        found = critical_learning_rate(lambda rate: (1 - 2 * rate) ** 2)
        assert found.outcome is Crossing.FOUND
        assert found.bracket[0] == 1.0


@given(
    exact=st.floats(1e-4, 1e4),
    octaves=st.floats(-19, 19),
    scale=st.floats(1e-6, 1e6),
    offset=st.floats(0, 1e3),
)
def test_every_quadratic(exact: float, octaves: float, scale: float, offset: float) -> None:
    """scale · (η² − η·η_c) + offset · scale · η_c²: above its start from η_c on."""
    begin, calls = exact * 2**octaves, []

    def loss(rate: float) -> float:
        calls.append(rate)
        return scale * exact**2 * ((rate / exact) ** 2 - rate / exact + offset)

    found = critical_learning_rate(loss, learning_rate=begin)
    low, high = found.bracket
    # In float64 the loss resolves the rate to about eps · offset beside the crossing.
    slack = 1e-12 * (1 + offset)
    assert found.outcome is Crossing.FOUND
    assert low <= exact * (1 + slack) and exact * (1 - slack) <= high
    assert 1 - low / high < 1 / 16
    assert abs(found.value / exact - 1) < WITHIN + slack + 1e-9
    octave = math.ceil(abs(octaves) + 1e-9)  # beside a whole one rounding may add a step
    assert found.forwards == len(calls) <= 1 + (2 + octave) + 1 + 4
    assert loss(low) <= loss(0.0) < loss(high)


class TestOutcomes:
    def test_no_increase_is_infinite(self) -> None:
        found = critical_learning_rate(lambda rate: math.exp(-rate))
        assert found.outcome is Crossing.NO_INCREASE
        assert (found.value, found.critical_sharpness) == (math.inf, 0.0)
        assert found.bracket == (2.0**20, math.inf)
        assert found.forwards == 22

    @pytest.mark.parametrize("begin", [1e-9, 1.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_uphill_update_has_no_critical_rate(self, begin: float, dtype: torch.dtype) -> None:
        def loss(rate: float) -> Tensor:
            return torch.tensor(2.0 + rate + rate**2, dtype=torch.float64).to(dtype)

        found = critical_learning_rate(loss, learning_rate=begin)
        assert found.outcome is Crossing.NO_DECREASE
        assert math.isnan(found.value) and math.isnan(found.critical_sharpness)
        assert found.forwards <= 23

    def test_a_decrease_that_is_only_rounding_is_none(self) -> None:
        """Uphill, but one unit in the last place down at small rates, as rounding may have it."""

        def loss(rate: float) -> Tensor:
            noise = -6e-8 if 0 < rate < 1e-3 else 0.0
            return torch.tensor(1.0 + noise + rate**2 * 1e3 + rate)

        assert critical_learning_rate(loss).outcome is Crossing.NO_DECREASE

    @pytest.mark.parametrize("beyond", [math.inf, math.nan, -math.inf])
    def test_a_loss_that_is_not_finite_has_risen(self, beyond: float) -> None:
        found = critical_learning_rate(lambda rate: beyond if rate > 0.3 else -rate)
        assert found.bracket[0] <= 0.3 < found.bracket[1]
        assert found.value == pytest.approx(0.3, rel=WITHIN)

    @pytest.mark.parametrize("start", [math.inf, math.nan])
    def test_a_start_that_is_not_finite(self, start: float) -> None:
        found = critical_learning_rate(lambda rate: start)
        assert found.outcome is Crossing.NOT_FINITE
        assert math.isnan(found.value)
        assert found.forwards == 1

    @pytest.mark.parametrize("last", [None, math.inf, math.nan, 0.0])
    def test_where_the_last_one_was_no_rate_the_learning_rate_takes_its_place(
        self, last: float | None
    ) -> None:
        found = critical_learning_rate(lambda rate: rate**2 - rate, last=last, learning_rate=0.7)
        assert found.value == pytest.approx(1.0, rel=WITHIN)
        assert found.forwards == 7

    @pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
    def test_a_learning_rate_that_is_none(self, rate: float) -> None:
        with pytest.raises(DyndiagError, match=r"learning_rate .*above 0, but it is"):
            critical_learning_rate(lambda rate: rate, learning_rate=rate)


def first_on_a_grid(loss: object, until: float, points: int = 400) -> float:
    """The first crossing of a function on a fine grid."""
    rates = np.linspace(0, until, points)
    values = np.array([float(loss(rate)) for rate in rates])  # type: ignore[operator]
    return float(rates[1:][values[1:] > values[0]][0])


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, squared error", "attention"])
def test_of_a_network_against_a_fine_grid(name: str) -> None:
    problem = PROBLEMS[name]()
    operator = hessian(problem.model, problem.loss_fn, problem.batch)
    line = loss_along(problem.model, problem.loss_fn, problem.batch, operator.gradient)
    assert line(0.0).item() == pytest.approx(operator.loss, rel=1e-14)
    found = critical_learning_rate(line)
    exact = first_on_a_grid(line, 1.5 * found.value)
    assert found.value == pytest.approx(exact, rel=WITHIN + 1.5 / 400)


def test_near_a_minimum_it_is_two_over_the_directional_sharpness() -> None:
    """Least squares is quadratic in a linear model: no higher order, so exact up to bisection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(5, 1).double()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    operator = hessian(model, loss_fn, (x, y))
    update = operator.gradient * torch.linspace(0.5, 2, 6, dtype=torch.float64)
    found = critical_learning_rate(loss_along(model, loss_fn, (x, y), update))
    exact = directional_sharpness(operator, update).item()
    assert found.critical_sharpness == pytest.approx(exact, rel=1.01 * WITHIN)


def test_the_step_that_an_optimizer_took() -> None:
    """Momentum, preconditioner and decay included: at its own rate the line passes θ⁺."""
    problem = PROBLEMS["mlp, cross-entropy"]()
    model = problem.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        state = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        problem.loss_fn(model, problem.batch).backward()
        optimizer.step()
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = problem.loss_fn(model, problem.batch).item()
    model.load_state_dict(state)
    line = loss_along(model, problem.loss_fn, problem.batch, (before - after) / 0.05)
    assert line(0.05).item() == pytest.approx(expected, rel=1e-12)
    found = critical_learning_rate(line, learning_rate=0.05)
    low, high = found.bracket
    assert line(low) <= line(0.0) < line(high)


class Noisy(nn.Module):
    """Dropout, BatchNorm and a counter, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.4), nn.Linear(7, 3)
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def noisy_problem() -> Problem:
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Noisy()
    x = torch.randn(12, 6, generator=generator)
    return Problem(model, cross_entropy, (x, torch.arange(12) % 3))


def everything(model: nn.Module) -> list[Tensor]:
    return [
        *(t.clone() for t in model.state_dict().values()),
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        torch.get_rng_state(),
        torch.tensor([model.calls, model.training]),
        torch.from_numpy(np.random.get_state(legacy=True)[1].astype(np.int64)),  # type: ignore[index]
    ]


class TestALine:
    def test_leaves_no_trace(self) -> None:
        problem = noisy_problem()
        loss = problem.loss_fn(problem.model, problem.batch)
        loss.backward(retain_graph=True)  # so that there are gradients, and a graph to spoil
        update = torch.cat(
            [p.grad.flatten() for p in problem.model.parameters() if p.grad is not None]
        )
        gradients = [p.grad for p in problem.model.parameters()]
        before, python = everything(problem.model), random.getstate()
        line = loss_along(problem.model, problem.loss_fn, problem.batch, update)
        found = critical_learning_rate(line)
        assert found.outcome is Crossing.FOUND
        for now, then in zip(everything(problem.model), before, strict=True):
            assert torch.equal(now, then)
        assert random.getstate() == python
        assert all(p.grad is g for p, g in zip(problem.model.parameters(), gradients, strict=True))
        loss.backward()  # the user's graph is still valid

    def test_leaves_no_trace_when_the_loss_raises(self) -> None:
        problem = noisy_problem()
        before = everything(problem.model)

        def broken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            model(batch[0])
            raise KeyError("labels")

        size = sum(p.numel() for p in problem.model.parameters())
        with pytest.raises(KeyError):
            loss_along(problem.model, broken, problem.batch, torch.ones(size))(1.0)
        for now, then in zip(everything(problem.model), before, strict=True):
            assert torch.equal(now, then)

    def test_sees_one_dropout_mask(self) -> None:
        problem = noisy_problem()
        size = sum(p.numel() for p in problem.model.parameters())
        line = loss_along(problem.model, problem.loss_fn, problem.batch, torch.zeros(size))
        assert len({line(rate).item() for rate in (0.0, 1.0, 2.0, 0.0)}) == 1
        assert problem.model.training
        # The mask of the Hessian, so that its loss and gradient belong to the same line.
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        assert line(0.0).item() == pytest.approx(operator.loss, rel=1e-6)

    def test_sees_the_same_draws_of_a_loss_with_a_generator_of_its_own(self) -> None:
        problem, own = noisy_problem(), torch.Generator().manual_seed(3)

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            noise = torch.randn(batch[0].shape, generator=own)
            return cross_entropy(model, (batch[0] + noise, batch[1]))

        size = sum(p.numel() for p in problem.model.parameters())
        line = loss_along(problem.model, loss_fn, problem.batch, torch.zeros(size))
        assert line(0.0) == line(1.0)
        assert torch.equal(own.get_state(), torch.Generator().manual_seed(3).get_state())

    def test_is_forward_only(self) -> None:
        problem = PROBLEMS["mlp, cross-entropy"]()
        graphs = []

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(model, batch)
            graphs.append(loss.requires_grad)
            return loss

        loss_along(problem.model, loss_fn, problem.batch, torch.ones(73).double())(0.1)
        assert graphs == [False]

    def test_of_a_loss_made_of_derivatives(self) -> None:
        model = nn.Linear(3, 1, bias=False).double()
        x = torch.ones(2, 3, dtype=torch.float64)

        def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
            at = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
            return slope.square().sum()

        weights = model.weight.detach().flatten()
        line = loss_along(model, loss_fn, x, weights)
        assert line(0.5).item() == pytest.approx(2 * (weights / 2).square().sum().item())
        assert not line(0.5).requires_grad
        assert critical_learning_rate(line).value == pytest.approx(2.0, rel=WITHIN)

    def test_over_a_loader_with_a_short_last_batch(self) -> None:
        model = mlp()
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
        y = torch.arange(10) % 3
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        update = torch.randn(73, generator=generator, dtype=torch.float64)
        whole = loss_along(model, cross_entropy, (x, y), update)
        cut = loss_along(model, cross_entropy, loader, update)
        for rate in (0.0, 0.3):
            assert cut(rate).item() == pytest.approx(whole(rate).item(), rel=1e-12)

    def test_leaves_frozen_parameters_where_they_are(self) -> None:
        model = mlp()
        next(model.parameters()).requires_grad_(False)
        seen = []

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(copy.deepcopy(model.state_dict()))
            return cross_entropy(model, batch)

        batch = (torch.ones(3, 6, dtype=torch.float64), torch.arange(3))
        loss_along(model, loss_fn, batch, torch.ones(31).double())(0.5)
        moved = {k: (v - seen[0][k]).unique().tolist() for k, v in model.state_dict().items()}
        assert moved.pop("0.weight") == [0.0]
        assert all(step == pytest.approx([0.5] * len(step)) for step in moved.values())

    def test_over_some_parameters(self) -> None:
        problem = PROBLEMS["mlp, cross-entropy"]()
        model, loss_fn, batch = problem.model, problem.loss_fn, problem.batch
        operator = hessian(model, loss_fn, batch, parameters="2")
        line = loss_along(model, loss_fn, batch, operator.gradient, parameters="2")
        slope = (line(1e-6) - line(-1e-6)) / 2e-6
        assert slope.item() == pytest.approx(-operator.gradient.square().sum().item(), rel=1e-6)

    def test_what_is_wrong_is_said_at_the_door(self) -> None:
        model, batch = mlp(), (torch.ones(3, 6, dtype=torch.float64), torch.arange(3))
        with pytest.raises(DyndiagError, match=r"shape \(73,\).*has shape \(3,\)"):
            loss_along(model, cross_entropy, batch, torch.ones(3))
        each = loss_along(model, lambda m, b: m(b[0]).sum(1), batch, torch.ones(73))
        with pytest.raises(DyndiagError, match=r"one number.*shape \(3,\).*\.mean\(\)"):
            each(0.0)
        number = loss_along(model, lambda m, b: m(b[0]).sum().item(), batch, torch.ones(73))
        with pytest.raises(DyndiagError, match=r"one number.*float"):
            number(0.0)


def test_the_result_is_a_plain_record() -> None:
    found = CriticalLearningRate(0.5, (0.49, 0.51), 7, Crossing.FOUND)
    assert found.critical_sharpness == 4.0
