"""SAM's edge against a small SAM that is run just below and just above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dyndiag.curvature import eigenpairs
from dyndiag.errors import DyndiagError
from dyndiag.optimizers import (
    SAMRule,
    Unknown,
    edge_operator,
    read_rule,
    read_sam,
    sam_operator,
    sam_ratio,
    sam_threshold,
)
from tests.oracles.quadratics import positive_definite, split
from tests.oracles.spectra import dense, of_matrix
from tests.sam import SAM, USAM

EDGES = [(0.01, 0.0, 17.0820), (0.01, 0.9, 29.3725), (0.5, 0.0, 5.4031), (0.5, 0.9, 7.7750)]


def steps(
    optimizer: Any,
    parameters: list[nn.Parameter],
    hessian: Tensor,
    count: int,
    most: float = 1e-2,
) -> list[float]:
    """Norms of the weights after each of `count` steps of SAM on ½θᵀHθ; fewer once they blow up."""
    sizes = [p.numel() for p in parameters]

    @torch.no_grad()
    def closure() -> None:
        gradient = hessian @ torch.cat(list(parameters))
        for p, part in zip(parameters, gradient.split(sizes), strict=True):
            p.grad = part.clone()

    norms = []
    for _ in range(count):
        optimizer.step(closure)
        norms.append(float(torch.cat([p.detach() for p in parameters]).norm()))
        if not norms[-1] < most:
            break
    return norms


def shrink(norms: list[float], count: int) -> bool:
    """Whether the second half's norms did."""
    return len(norms) == count and max(norms[-30:]) < max(norms[count // 2 :][:30])


@pytest.mark.parametrize(("radius", "beta", "truth"), EDGES)
def test_threshold(radius: float, beta: float, truth: float) -> None:
    threshold = sam_threshold(0.1, radius, gain=1 / (1 + beta))
    assert threshold == pytest.approx(truth, abs=6e-5)
    assert sam_ratio(threshold, 0.1, radius, gain=1 / (1 + beta)) == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize(("radius", "beta", "truth"), EDGES)
def test_stable_just_below_and_unstable_just_above(
    radius: float, beta: float, truth: float
) -> None:
    for factor, stable in ((0.99, True), (1.01, False)):
        hessian = torch.diag(factor * truth * torch.tensor([1.0, 0.1], dtype=torch.float64))
        parameters = split(hessian)
        optimizer = USAM(parameters, SGD, rho=radius, lr=0.1, momentum=beta)
        assert shrink(steps(optimizer, parameters, hessian, 600), 600) is stable


def test_without_a_radius_it_is_the_base_s() -> None:
    assert sam_threshold(0.1, 0.0) == pytest.approx(20.0, rel=1e-15)
    assert sam_threshold(0.1, 1e-14) == pytest.approx(20.0, rel=1e-11)
    assert sam_threshold(0.0, 0.5) == math.inf


def frozen_adam(p: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(p, lr=0.1, betas=(0.9, 1 - 2**-53), eps=0.0, weight_decay=0.5)
    for q, v in zip(p, (1.0, 4.0, 0.25), strict=True):
        optimizer.state[q] = {
            "step": torch.tensor(1e18, dtype=torch.float64),
            "exp_avg": torch.zeros_like(q),
            "exp_avg_sq": torch.full_like(q, v),
        }
    return optimizer


def mixed(p: list[nn.Parameter]) -> Optimizer:
    return SGD(
        [
            {"params": p[0], "lr": 0.1, "weight_decay": 0.3},
            {"params": p[1], "lr": 0.03, "momentum": 0.9},
            {"params": p[2], "lr": 0.2, "momentum": 0.5, "weight_decay": 0.7},
        ],
        lr=1.0,
    )


@pytest.mark.parametrize("base", [mixed, frozen_adam])
def test_over_any_base_it_acts_on_h_plus_rho_h_squared(
    base: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    """χ = ½λ₁(A^½(H + ρH² + γ)A^½ + ηγ_d): bisected to the edge, and SAM run either side of it."""
    hessian = positive_definite(3, seed=3)

    def measured(scale: float) -> float:
        parameters = split(hessian, 3)
        optimizer = USAM(parameters, base(parameters), rho=0.05)
        steps(optimizer, parameters, 1e-9 * hessian, 1)
        rule = read_sam(optimizer, parameters)
        assert isinstance(rule, SAMRule) and not rule.normalised
        operator = sam_operator(of_matrix(scale * hessian), rule.effective_radius(3.0))
        edge = edge_operator(operator, rule.base)
        return float(eigenpairs(edge, relative_tolerance=1e-9).values[0]) / 2

    low, high = 1e-2, 1e3
    for _ in range(18):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measured(middle) < 1 else (low, middle)
    for factor, stable in ((0.99, True), (1.01, False)):
        scaled = factor * low * hessian
        parameters = split(scaled, 3)
        for p in parameters:
            p.data *= 1e-6  # before g² could reach the frozen moments
        norms = steps(USAM(parameters, base(parameters), rho=0.05), parameters, scaled, 1500)
        assert shrink(norms, 1500) is stable, norms[-1]


def test_sam_operator() -> None:
    hessian = positive_definite(4, seed=1)
    torch.testing.assert_close(
        dense(sam_operator(of_matrix(hessian), 0.3)), hessian + 0.3 * hessian @ hessian
    )


@pytest.mark.parametrize(
    ("curvature", "amplitude"), [(1.0, 0.00263), (5.0, 0.01667), (15.0, 0.15), (19.0, 0.95)]
)
def test_normalised_its_ratio_is_one_by_itself(curvature: float, amplitude: float) -> None:
    """In a cycle of two steps, though plain descent would converge: 1 is no evidence."""
    hessian = torch.tensor([[curvature]], dtype=torch.float64)
    parameters = [nn.Parameter(torch.tensor([0.3], dtype=torch.float64))]
    optimizer = SAM(parameters, SGD, rho=0.05, lr=0.1)
    last = steps(optimizer, parameters, hessian, 400, most=1.0)[-1]
    assert last == pytest.approx(amplitude, rel=2e-3)
    rule = read_sam(optimizer, parameters)
    assert isinstance(rule, SAMRule) and rule.normalised
    radius = rule.effective_radius(curvature * last)
    assert sam_ratio(curvature, 0.1, radius) == pytest.approx(1.0, rel=1e-6)
    assert sam_ratio(curvature, 0.1, 0.0) < 1  # and the base's says so


def test_without_a_gradient_the_normalised_radius_has_no_bound() -> None:
    parameters = split(torch.eye(2))
    rule = read_sam(SAM(parameters, SGD, rho=0.05, lr=0.1), parameters)
    assert isinstance(rule, SAMRule)
    assert rule.effective_radius(0.0) == math.inf
    assert rule.effective_radius(0.1) == 0.5


class TestReading:
    parameters = split(torch.eye(4), 2)

    def test_what_is_no_sam_is_none(self) -> None:
        class Lookahead(SAM):
            def __init__(self) -> None:
                Optimizer.__init__(self, TestReading.parameters, {})
                self.base_optimizer = SGD(TestReading.parameters, lr=0.1)

        assert read_sam(SGD(self.parameters, lr=0.1), self.parameters) is None
        adadelta = torch.optim.Adadelta(self.parameters)  # which has a rho, another one
        assert read_sam(adadelta, self.parameters) is None
        assert read_sam(Lookahead(), self.parameters) is None

    def test_a_class_that_derives_from_it(self) -> None:
        class Ours(SAM):
            pass

        rule = read_sam(Ours(self.parameters, SGD, lr=0.1, rho=0.2), self.parameters, [0.3])
        assert isinstance(rule, SAMRule)
        assert rule.radius == 0.2 and rule.normalised
        assert rule.base.threshold() == pytest.approx(2 / 0.3)

    def test_the_flag_that_turns_the_norm_off(self) -> None:
        rule = read_sam(SAM(self.parameters, SGD, lr=0.1, normalize=False), self.parameters)
        assert isinstance(rule, SAMRule) and not rule.normalised

    def test_a_radius_on_the_object(self) -> None:
        optimizer = SAM(self.parameters, SGD, lr=0.1)
        for group in optimizer.param_groups:
            del group["rho"]
        del optimizer.defaults["rho"]
        optimizer.rho = 0.07  # type: ignore[attr-defined]
        rule = read_sam(optimizer, self.parameters)
        assert isinstance(rule, SAMRule) and rule.radius == 0.07

    def unknown(self, optimizer: Any) -> str:
        rule = read_sam(optimizer, self.parameters)
        assert isinstance(rule, Unknown)
        return rule.reason

    def test_others_of_the_family(self) -> None:
        LookSAM = type("LookSAM", (Optimizer,), dict(SAM.__dict__))
        optimizer = SAM(self.parameters, SGD, lr=0.1)
        optimizer.__class__ = LookSAM
        assert "only SAM and USAM are known" in self.unknown(optimizer)

    def test_adaptive(self) -> None:
        optimizer = SAM(self.parameters, SGD, lr=0.1)
        optimizer.param_groups[0]["adaptive"] = True
        assert "adaptive=True" in self.unknown(optimizer)

    def test_groups_of_different_radius(self) -> None:
        optimizer = SAM([{"params": p} for p in self.parameters], SGD, lr=0.1)
        optimizer.param_groups[1]["rho"] = 0.3
        assert "no one radius" in self.unknown(optimizer)

    def test_a_base_that_is_not_known(self) -> None:
        optimizer = SAM(self.parameters, torch.optim.Rprop, lr=0.1)
        assert "base optimizer the stability threshold of Rprop" in self.unknown(optimizer)
        optimizer = SAM(self.parameters, Adam, lr=0.1)
        assert "not moved any" in self.unknown(optimizer)
        optimizer.base_optimizer = "sgd"  # type: ignore[assignment]
        assert "is a str" in self.unknown(optimizer)

    def test_read_rule_does_not_take_the_wrapper_for_its_base(self) -> None:
        rule = read_rule(SAM(self.parameters, SGD, lr=0.1), self.parameters)
        assert isinstance(rule, Unknown) and "wraps another optimizer" in rule.reason


@pytest.mark.parametrize(
    "use",
    [
        lambda: sam_threshold(0.1, -1.0),
        lambda: sam_threshold(-0.1, 1.0),
        lambda: sam_threshold(0.1, 1.0, gain=0.0),
        lambda: sam_operator(of_matrix(torch.eye(2)), math.inf),
    ],
)
def test_what_cannot_be_is_refused(use: Callable[[], object]) -> None:
    with pytest.raises(DyndiagError):
        use()
