"""The norm of each parameter's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dyndiag.probes.gradients.parameter_norms import ParameterNorms
from dyndiag.schedule import Every
from tests.models import batches, cross_entropy, mlp
from tests.probes.stepping import give, parameters, passing, row, take


def test_each_parameters_norm_is_that_of_pytorch() -> None:
    model: Any = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model, batches("mlp", 1)[0]).backward()
    model[2].bias.grad = None
    expected = {
        f"gradients/parameter_norm/{name}": p.grad.norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert len(expected) == 3
    assert take(ParameterNorms(), model, optimizer) == pytest.approx(expected, rel=1e-6)


def test_due_every_eleventh_step() -> None:
    assert [step for step in range(30) if ParameterNorms().due.due(step)] == [0, 11, 22]


def test_many_parameters_make_one_array() -> None:
    model = torch.nn.ParameterList([torch.zeros(2) for _ in range(129)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    give(model, *[None if i == 5 else [3.0 * i, 4.0 * i] for i in range(129)])
    (found,) = take(ParameterNorms(), model, optimizer).values()
    assert found.shape == (129,) and math.isnan(found[5])
    assert found[128] == pytest.approx(5 * 128)


def test_after_a_closure_and_without_any_gradient() -> None:
    model = parameters([1.0], [2.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = ParameterNorms(Every(1))
    assert take(probe, model, optimizer) == {}
    give(model, [-3.0], None)
    assert row(probe.after(passing(model, optimizer, 1))) == {"gradients/parameter_norm/a": 3.0}
