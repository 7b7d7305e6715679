"""χ read off the live optimizer, against what the optimizer then does.

For every setting: build the quadratic on which the rule says χ = 0.995, run torch's own class, and
see it shrink; at χ = 1.005 see it grow. Second moments are frozen, which is what χ assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from dyndiag.curvature import eigenpairs
from dyndiag.optimizers import UpdateRule, edge_operator, preconditioned_operator, read_rule
from tests.oracles.quadratics import Freeze, growth, one_step, positive_definite, split
from tests.oracles.spectra import of_matrix

RATE, BETA = 0.1, 0.9
KEEP = 1 - 2**-53  # a β₂ that forgets nothing and learns nothing
LATE = 1e18  # a step count at which bias corrections are 1
MU_1_TO_9 = math.prod(BETA * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in range(1, 10))

Make = Callable[[list[nn.Parameter]], Optimizer]


def top(operator) -> float:
    return float(eigenpairs(operator, relative_tolerance=1e-9, certificate_width=1e-9).values[0])


def edge_ratio(hessian: Tensor, rule: UpdateRule) -> float:
    return top(edge_operator(of_matrix(hessian), rule)) / 2


def rule_on(make: Make, hessian: Tensor, pieces: int, freeze: Freeze | None) -> UpdateRule:
    parameters = split(hessian, pieces)
    optimizer = make(parameters)
    one_step(optimizer, parameters, hessian, freeze)
    rule = read_rule(optimizer, parameters)
    assert isinstance(rule, UpdateRule)
    return rule


def scale_for(
    edge: float, make: Make, hessian: Tensor, pieces: int, freeze: Freeze | None
) -> float:
    """The factor on the Hessian at which χ = edge: χ is monotone in it, so bisect."""
    low, high = 1e-6, 1e6
    rule = rule_on(make, hessian, pieces, freeze)
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if edge_ratio(middle * hessian, rule) < edge else (low, middle)
    return low


def frozen(**state: float | Tensor) -> Freeze:
    """Sets these entries of a parameter's state before every step; tensors one entry per weight."""

    def freeze(optimizer: Optimizer, p: Tensor) -> None:
        held = optimizer.state[p]
        if "exp_avg" not in held and "exp_inf" not in held and "square_avg" not in held:
            held.setdefault("step", torch.tensor(0.0))
            for name in ("exp_avg", "momentum_buffer", "grad_avg"):
                held[name] = torch.zeros_like(p)
        for name, value in state.items():
            if name in ("step", "mu_product"):
                held[name] = torch.tensor(value, dtype=torch.float64)
            else:
                held[name] = torch.as_tensor(value, dtype=p.dtype).expand_as(p).clone()

    return freeze


adam_moments = frozen(exp_avg_sq=torch.tensor([1.0, 4.0, 0.25]), step=LATE)
largest_moments = frozen(exp_avg_sq=1e-9, max_exp_avg_sq=torch.tensor([1.0, 4.0, 0.25]), step=LATE)

CASES: dict[str, tuple[Make, Freeze | None]] = {
    "sgd": (lambda p: SGD(p, lr=RATE), None),
    "heavy ball": (lambda p: SGD(p, lr=RATE, momentum=BETA), None),
    "dampening": (lambda p: SGD(p, lr=RATE, momentum=BETA, dampening=0.5), None),
    "nesterov": (lambda p: SGD(p, lr=RATE, momentum=BETA, nesterov=True), None),
    "heavy ball, decay": (lambda p: SGD(p, lr=RATE, momentum=BETA, weight_decay=0.5), None),
    "nesterov, decay": (
        lambda p: SGD(p, lr=RATE, momentum=BETA, nesterov=True, weight_decay=0.5),
        None,
    ),
    "adam": (lambda p: Adam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0), adam_moments),
    "adam, decay": (
        lambda p: Adam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0, weight_decay=2.0),
        adam_moments,
    ),
    "amsgrad": (
        lambda p: Adam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0, amsgrad=True),
        largest_moments,
    ),
    "adamw": (
        lambda p: AdamW(p, lr=RATE, betas=(BETA, KEEP), eps=0.0, weight_decay=2.0),
        adam_moments,
    ),
    "rmsprop, momentum": (
        lambda p: RMSprop(p, lr=RATE, alpha=KEEP, eps=0.0, momentum=BETA),
        frozen(square_avg=torch.tensor([1.0, 4.0, 0.25])),
    ),
    "rmsprop, centred": (
        lambda p: RMSprop(p, lr=RATE, alpha=KEEP, eps=0.0, centered=True),
        frozen(square_avg=torch.tensor([1.0, 4.0, 0.5]), grad_avg=0.5),
    ),
    "adagrad": (
        lambda p: Adagrad(p, lr=RATE, lr_decay=0.1, eps=0.0),
        frozen(sum=torch.tensor([1.0, 4.0, 0.25]), step=9.0),
    ),
    "nadam, step 1,000": (
        lambda p: NAdam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0),
        frozen(exp_avg_sq=1000 * 2**-53, step=999.0, mu_product=0.0),
    ),
    "nadam, a steep schedule": (  # μ₁ = .43, μ₂ = .48
        lambda p: NAdam(p, lr=RATE, betas=(0.5, KEEP), eps=0.0, momentum_decay=30.0),
        frozen(exp_avg_sq=2**-53, step=0.0, mu_product=0.5),
    ),
    "radam, step 3, not adaptive yet": (
        lambda p: RAdam(p, lr=RATE, betas=(BETA, 0.999), eps=0.0),
        frozen(exp_avg_sq=torch.tensor([1.0, 4.0, 0.25]), step=2.0),
    ),
    "radam, step 8": (
        lambda p: RAdam(p, lr=RATE, betas=(BETA, 0.999), eps=0.0),
        frozen(exp_avg_sq=torch.tensor([1.0, 4.0, 0.25]), step=7.0),
    ),
    "radam, step 500": (
        lambda p: RAdam(p, lr=RATE, betas=(BETA, 0.999), eps=0.0),
        frozen(exp_avg_sq=torch.tensor([1.0, 4.0, 0.25]), step=499.0),
    ),
    "adamax": (
        lambda p: Adamax(p, lr=RATE, betas=(BETA, KEEP), eps=0.0),
        frozen(exp_inf=torch.tensor([1.0, 2.0, 0.5]), step=LATE),
    ),
    "adadelta": (
        lambda p: Adadelta(p, lr=RATE, rho=KEEP, eps=0.0),
        frozen(square_avg=torch.tensor([1.0, 4.0, 0.25]), acc_delta=torch.tensor([1.0, 0.3, 2.0])),
    ),
    "asgd": (lambda p: ASGD(p, lr=RATE, lambd=0.5, alpha=0.0, weight_decay=0.3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_stable_just_below_and_unstable_just_above(case):
    make, freeze = CASES[case]
    hessian = positive_definite(3, seed=3)
    for edge, stable in ((0.99, True), (1.01, False)):
        scaled = scale_for(edge, make, hessian, 1, freeze) * hessian
        parameters = split(scaled)
        grew = growth(make(parameters), parameters, scaled, freeze=freeze, most=1e-4)
        assert (grew < 1) is stable, (edge, grew)


GROUPS: dict[str, tuple[Make, Freeze | None]] = {
    "heavy ball": (
        lambda p: SGD(
            [
                {"params": p[0], "lr": 0.1, "weight_decay": 0.3},
                {"params": p[1], "lr": 0.03, "momentum": 0.9},
                {"params": p[2], "lr": 0.2, "momentum": 0.5, "weight_decay": 0.7},
            ],
            lr=1.0,
        ),
        None,
    ),
    "nesterov": (
        lambda p: SGD(
            [
                {"params": p[0], "lr": 0.1, "weight_decay": 0.3},
                {"params": p[1], "lr": 0.03, "momentum": 0.9, "nesterov": True},
                {"params": p[2], "lr": 0.2, "momentum": 0.5, "nesterov": True},
            ],
            lr=1.0,
        ),
        None,
    ),
    "adamw": (
        lambda p: AdamW(
            [
                {"params": p[0], "lr": 0.1, "weight_decay": 0.3},
                {"params": p[1], "lr": 0.03, "weight_decay": 0.0},
                {"params": p[2], "lr": 0.2, "weight_decay": 4.0},
            ],
            betas=(BETA, KEEP),
            eps=0.0,
        ),
        frozen(exp_avg_sq=1.0, step=LATE),
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_with_their_own_settings_share_one_edge(case):
    make, freeze = GROUPS[case]
    hessian = positive_definite(3, seed=3)
    assert rule_on(make, hessian, 3, freeze).threshold() is None
    for edge, stable in ((0.99, True), (1.01, False)):
        scaled = scale_for(edge, make, hessian, 3, freeze) * hessian
        parameters = split(scaled, 3)
        grew = growth(make(parameters), parameters, scaled, 3000, freeze, most=1e-4)
        assert (grew < 1) is stable, (edge, grew)


THRESHOLDS: dict[str, tuple[Make, Freeze | None, float]] = {
    "sgd": (CASES["sgd"][0], None, 20.0),
    "heavy ball": (CASES["heavy ball"][0], None, 38.0),
    "dampening": (CASES["dampening"][0], None, 76.0),
    "nesterov": (CASES["nesterov"][0], None, 13.5714),
    "sgd, decay": (lambda p: SGD(p, lr=RATE, weight_decay=0.5), None, 19.5),
    "heavy ball, decay": (CASES["heavy ball, decay"][0], None, 37.5),
    "nesterov, decay": (CASES["nesterov, decay"][0], None, 13.0714),
    "adam": (*CASES["adam"], 380.0),
    "adamw .5": (
        lambda p: AdamW(p, lr=RATE, betas=(BETA, KEEP), eps=0.0, weight_decay=0.5),
        adam_moments,
        370.5,
    ),
    "adamw 2": (*CASES["adamw"], 342.0),
    "rmsprop": (
        lambda p: RMSprop(p, lr=RATE, alpha=KEEP, eps=0.0),
        frozen(square_avg=1.0),
        20.0,
    ),
    "nadam, step 10": (
        lambda p: NAdam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0),
        frozen(exp_avg_sq=10 * 2**-53, step=9.0, mu_product=MU_1_TO_9),
        34.9,
    ),
    "nadam, step 1,000": (*CASES["nadam, step 1,000"], 39.3),
    "nadam, step 10,000": (
        lambda p: NAdam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0),
        frozen(exp_avg_sq=10_000 * 2**-53, step=9999.0, mu_product=0.0),
        86.7,
    ),
    "nadam, at last": (
        lambda p: NAdam(p, lr=RATE, betas=(BETA, KEEP), eps=0.0),
        frozen(exp_avg_sq=1.0, step=LATE, mu_product=0.0),
        135.71,
    ),
    "amsgrad": (*CASES["amsgrad"], 380.0),
    "radam": (*CASES["radam, step 500"], 380.0),
    "radam, not adaptive yet": (*CASES["radam, step 3, not adaptive yet"], 380.0),
    "adamax": (*CASES["adamax"], 380.0),
    "rmsprop, momentum": (*CASES["rmsprop, momentum"], 38.0),
    "rmsprop, centred": (*CASES["rmsprop, centred"], 20.0),
    "adagrad": (*CASES["adagrad"], 2 / (RATE / 1.9)),  # 1 + (10 − 1) · .1
    "adadelta": (*CASES["adadelta"], 20.0),
    "asgd": (lambda p: ASGD(p, lr=RATE, lambd=0.5, alpha=0.0), None, 19.5),
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_threshold(case):
    """The edges of the table at a learning rate of .1 and a momentum of .9."""
    make, freeze, expected = THRESHOLDS[case]
    rule = rule_on(make, positive_definite(3, seed=3), 1, freeze)
    assert rule.threshold() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_edge_ratio_line_agrees_with_the_eigenproblem(case):
    make, freeze = CASES[case]
    hessian = positive_definite(3, seed=5)
    rule = rule_on(make, hessian, 1, freeze)
    line = rule.edge_ratio_line()
    if case == "adam, decay":  # through P, decay is no longer a shift
        assert line is None
        assert rule.threshold() is None
        return
    assert line is not None
    operator = of_matrix(hessian)
    sharpness = top(preconditioned_operator(operator, rule) if rule.preconditioned else operator)
    slope, offset = line
    assert slope * sharpness + offset == pytest.approx(edge_ratio(hessian, rule), rel=1e-9)
    assert slope * rule.threshold() + offset == pytest.approx(1.0, rel=1e-12)


def test_truth_for_mixed_groups():
    """Closed form, by hand: H = [[4, 2], [2, 3]]."""
    hessian = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)

    def mixed(p: list[nn.Parameter]) -> Optimizer:
        return SGD(
            [
                {"params": p[0], "lr": 0.1},
                {"params": p[1], "lr": 0.3, "momentum": 0.9, "weight_decay": 1.0},
            ]
        )

    assert edge_ratio(hessian, rule_on(mixed, hessian, 2, None)) == pytest.approx(
        0.396247, abs=1e-6
    )

    def decoupled(p: list[nn.Parameter]) -> Optimizer:
        return AdamW(p, lr=0.1, betas=(BETA, KEEP), eps=0.0, weight_decay=0.1)

    moments = frozen(exp_avg_sq=torch.tensor([0.25, 4.0]), step=LATE)
    assert edge_ratio(hessian, rule_on(decoupled, hessian, 1, moments)) == pytest.approx(
        0.027542, abs=1e-6
    )


def test_asgd_slows_down_as_its_state_does():
    hessian = positive_definite(3, seed=3)
    parameters = split(hessian)
    optimizer = ASGD(parameters, lr=RATE, lambd=0.5, alpha=0.75)
    for _ in range(20):
        used = RATE if not optimizer.state else float(optimizer.state[parameters[0]]["eta"])
        one_step(optimizer, parameters, hessian, None)
        rule = read_rule(optimizer, parameters)
        assert rule.tensors[0].learning_rate == pytest.approx(used, rel=1e-6)
    assert rule.threshold() == pytest.approx(2 / used - 0.5)


def test_adadelta_is_never_taken_for_frozen():
    hessian = positive_definite(3, seed=3)
    parameters = split(hessian)
    optimizer = Adadelta(parameters, lr=RATE)
    for _ in range(300):
        one_step(optimizer, parameters, hessian, None)
    assert read_rule(optimizer, parameters).warmup


def test_adafactor_s_step_is_not_in_its_state():
    """The same state, the same learning rate, other steps: its update's own length divides it."""
    moved = []
    for scale in (1.0, 3.0):
        parameter = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.Adafactor([parameter], lr=0.01)
        optimizer.state[parameter] = {"step": torch.tensor(99.0), "variance": torch.ones(4)}
        parameter.grad = torch.full((4,), scale)
        optimizer.param_groups[0]["beta2_decay"] = -40.0  # nothing of this gradient in the state
        optimizer.step()
        moved.append(float(1 - parameter[0].detach()))
    assert moved[0] == pytest.approx(moved[1], rel=1e-4)  # not three times as far
    assert "Adafactor is not known" in read_rule(optimizer, [parameter]).reason
