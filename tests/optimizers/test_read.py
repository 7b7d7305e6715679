"""What `read_rule` reads off live optimizers, and what it refuses to read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from dyndiag.errors import DyndiagError
from dyndiag.optimizers import (
    Unknown,
    UpdateRule,
    edge_operator,
    preconditioned_operator,
    read_rule,
)
from tests.oracles.quadratics import one_step, positive_definite, split
from tests.oracles.spectra import dense, of_matrix

HESSIAN = positive_definite(6, seed=0)


def after(optimizer: Optimizer, parameters: list[nn.Parameter], steps: int = 3) -> Optimizer:
    for _ in range(steps):
        one_step(optimizer, parameters, HESSIAN, None)
    return optimizer


def known(optimizer: Optimizer, parameters: list[nn.Parameter]) -> UpdateRule:
    rule = read_rule(optimizer, parameters)
    assert isinstance(rule, UpdateRule), rule.reason
    return rule


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"weight_decay": 0.3},
        {"decoupled_weight_decay": True, "weight_decay": 0.3},
        {"foreach": True},
        {"fused": True, "weight_decay": 0.3},
        {"amsgrad": True, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_adams_step_is_the_rule_applied_to_its_own_average(options, steps):
    """θ⁺ = (1 − ηγ_d) θ − η P⁻¹ m: the state after the step gives the step."""
    parameters = split(HESSIAN, 2)
    for p in parameters:
        p.data.mul_(1e6)
    optimizer = after(Adam(parameters, lr=0.01, **options), parameters, steps - 1)
    before = [p.detach().clone() for p in parameters]
    after(optimizer, parameters, 1)
    for p, old, rule in zip(parameters, before, known(optimizer, parameters).tensors, strict=True):
        m = optimizer.state[p]["exp_avg"]
        moved = (1 - rule.learning_rate * rule.decoupled_decay) * old
        moved -= rule.learning_rate * m / rule.preconditioner
        torch.testing.assert_close(p.detach(), moved, rtol=1e-14, atol=1e-15)


def test_variants_of_adam_give_the_same_rule():
    rules = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        parameters = split(HESSIAN, 2)
        optimizer = after(Adam(parameters, lr=0.01, **options), parameters)
        rules.append(known(optimizer, parameters))
    for rule in rules[1:]:
        for ours, theirs in zip(rule.tensors, rules[0].tensors, strict=True):
            torch.testing.assert_close(
                ours.preconditioner, theirs.preconditioner, rtol=1e-12, atol=0
            )
            assert ours.gain == theirs.gain


def test_a_tensor_rate_and_tensor_betas_are_read_as_numbers():
    parameters = split(HESSIAN)
    optimizer = after(Adam(parameters, lr=torch.tensor(0.01), foreach=False), parameters)
    assert known(optimizer, parameters).tensors[0].learning_rate == pytest.approx(0.01)


def test_16_bit_moments_are_not_squared_in_16_bits():
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = Adam([p], lr=0.01)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert known(optimizer, [p]).tensors[0].preconditioner.dtype is torch.float32


def test_the_rate_of_the_step_not_the_schedulers_next_one():
    parameters = split(HESSIAN)
    optimizer = SGD(parameters, lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.5)  # wraps optimizer.step on the instance
    after(optimizer, parameters, 1)
    scheduler.step()
    assert known(optimizer, parameters).threshold() == pytest.approx(40.0)
    rule = read_rule(optimizer, parameters, [0.1])
    assert isinstance(rule, UpdateRule)
    assert rule.threshold() == pytest.approx(20.0)
    with pytest.raises(DyndiagError, match=r"each of the optimizer's 1 parameter groups.*holds 2"):
        read_rule(optimizer, parameters, [0.1, 0.2])


def test_reading_changes_nothing():
    parameters = split(HESSIAN, 2)
    optimizer = after(Adam(parameters[:1], lr=0.01), parameters[:1], 0)
    before = copy.deepcopy(optimizer.state_dict())
    read_rule(optimizer, parameters)
    assert str(optimizer.state_dict()) == str(before)
    assert not optimizer.state  # a defaultdict, which a careless look would fill


class TestTensorsThatStandStill:
    def partly(self, kind: type[Optimizer]) -> tuple[UpdateRule, Tensor]:
        """Three tensors: moved, in no group, in a group but never given a gradient."""
        parameters = split(HESSIAN, 3)
        optimizer = kind([parameters[0], parameters[2]], lr=0.1)
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        rule = known(optimizer, parameters)
        assert rule.tensors[1] is rule.tensors[2] is None
        assert not rule.covers_all
        assert not rule.uniform
        return rule, HESSIAN[:2, :2]

    def test_they_have_no_part_in_the_edge(self):
        rule, block = self.partly(Adam)
        a = rule.tensors[0].learning_rate * rule.tensors[0].gain / rule.tensors[0].preconditioner
        edge = dense(edge_operator(of_matrix(HESSIAN), rule))
        torch.testing.assert_close(edge[:2, :2], a.sqrt()[:, None] * block * a.sqrt())
        assert not edge[2:].any()
        assert not edge[:, 2:].any()

    def test_preconditioned_the_threshold_is_for_those_that_move(self):
        rule, block = self.partly(Adam)
        assert rule.threshold() == pytest.approx(380.0)
        p = rule.tensors[0].preconditioner.rsqrt()
        matrix = dense(preconditioned_operator(of_matrix(HESSIAN), rule))
        torch.testing.assert_close(matrix[:2, :2], p[:, None] * block * p)
        assert not matrix[2:].any()

    def test_without_preconditioner_no_one_sharpness_is_the_threshold(self):
        parameters = split(HESSIAN, 2)
        rule = known(after(SGD(parameters[:1], lr=0.1), parameters[:1], 0), parameters)
        assert rule.threshold() is None
        assert rule.edge_ratio_line() is None


def test_uniform_settings_over_all_parameters():
    parameters = split(HESSIAN, 2)
    assert known(after(SGD(parameters, lr=0.1), parameters), parameters).uniform
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2}]
    rule = known(after(SGD(groups), parameters), parameters)
    assert not rule.uniform
    assert rule.threshold() is None


def test_nothing_is_unstable_at_a_learning_rate_of_zero():
    parameters = split(HESSIAN)
    rule = known(after(SGD(parameters, lr=0.0), parameters), parameters)
    assert rule.threshold() == float("inf")
    assert not dense(edge_operator(of_matrix(HESSIAN), rule)).any()


@pytest.mark.parametrize(("beta", "last"), [(0.9, 43), (0.5, 6), (0.0, 0)])
def test_warmup_ends_when_the_bias_correction_is_within_one_percent(beta, last):
    parameters = split(HESSIAN)
    optimizer = Adam(parameters, lr=1e-3, betas=(beta, 0.999))
    for step in range(1, 50):
        after(optimizer, parameters, 1)
        assert known(optimizer, parameters).warmup is (step <= last)


def test_without_moments_there_is_no_warmup():
    parameters = split(HESSIAN)
    assert not known(after(SGD(parameters, lr=0.1, momentum=0.9), parameters, 1), parameters).warmup


class TestUnknown:
    def reason(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> str:
        rule = read_rule(optimizer, parameters)
        assert isinstance(rule, Unknown)
        return rule.reason

    def test_classes_that_are_not_listed(self):
        parameters = split(HESSIAN)
        for kind in (torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adafactor):
            assert f"threshold of {kind.__name__} is not known" in self.reason(
                kind(parameters), parameters
            )

    def test_a_subclass_with_its_own_step(self):
        class Lookahead(SGD):
            def step(self, closure=None):
                return super().step(closure)

        parameters = split(HESSIAN)
        optimizer = after(Lookahead(parameters, lr=0.1), parameters)
        assert "Lookahead" in self.reason(optimizer, parameters)

    def test_a_step_replaced_on_the_instance(self):
        parameters = split(HESSIAN)
        optimizer = SGD(parameters, lr=0.1)
        plain = optimizer.step
        optimizer.step = lambda closure=None: plain(closure)  # type: ignore[method-assign]
        assert "not known" in self.reason(optimizer, parameters)

    def test_ascent(self):
        parameters = split(HESSIAN)
        optimizer = AdamW(parameters, maximize=True)
        assert "maximize=True" in self.reason(optimizer, parameters)

    def test_before_the_first_step(self):
        parameters = split(HESSIAN)
        assert "not moved any" in self.reason(AdamW(parameters), parameters)
        assert "not moved any" in self.reason(torch.optim.Adagrad(parameters), parameters)


def test_a_subclass_that_keeps_torchs_step_is_that_optimizer():
    class Mine(AdamW):
        pass

    parameters = split(HESSIAN)
    rule = known(after(Mine(parameters, lr=0.1, weight_decay=0.5), parameters), parameters)
    assert rule.tensors[0].decoupled_decay == 0.5
    assert rule.threshold() == pytest.approx(370.5)
