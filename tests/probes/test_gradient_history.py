"""Adaptive thresholds and z-scores: the published rules step by step, and a spike in one layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyndiag.errors import DyndiagError
from dyndiag.probes.gradients import history as gradient_history
from dyndiag.probes.gradients.history import GradientHistory, Running, adapted
from tests.models import cross_entropy, mlp
from tests.probes.stepping import give, parameters, passing, row, take
from tests.probes.test_adam_moments import NoWaiting


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_zclip_by_its_published_numbers() -> None:
    running = Running.of(number(0) + torch.tensor([1.0, 3.0] * 12 + [2.0]))
    assert float(running.mean) == pytest.approx(2)
    assert float(running.variance) == pytest.approx(0.96)
    running, twelve = Running(number(2), number(0.96)), number(12)
    assert float(running.z_score(twelve)) == pytest.approx(10.206, abs=5e-4)
    assert float(running.fed(twelve)) == pytest.approx(2.600, abs=5e-4)
    later = running.next(twelve)
    assert float(later.mean) == pytest.approx(2.018, abs=5e-4)
    assert float(later.variance) == pytest.approx(0.9414, abs=5e-5)


def zclip(norms: list[float]) -> list[float]:
    """The rule as one would write it down."""
    mean, variance, found = float(np.mean(norms[:25])), float(np.var(norms[:25])), []
    for norm in norms[25:]:
        spread = math.sqrt(variance)
        z = (norm - mean) / (spread + 1e-6)
        fed = mean + 2.5**2 * spread / z if z > 2.5 else norm
        mean = 0.97 * mean + 0.03 * fed
        variance = 0.97 * variance + 0.03 * (fed - mean) ** 2
        found.append(z)
    return found


def adagc(norms: list[float], warm_up: int, lambda_abs: float) -> list[tuple[float, float]]:
    """(h, γ) after each step, as one would write it down."""
    gamma, found = math.inf, []
    for step, norm in enumerate(norms):
        limit = lambda_abs if step < warm_up else 1.05 * gamma
        h = min(limit / norm, 1.0)
        gamma = min(gamma, h * norm) if step < warm_up else 0.98 * gamma + 0.02 * h * norm
        found.append((h, gamma))
    return found


def run(norms: list[float], probe: GradientHistory) -> list[dict[str, float]]:
    model = parameters([0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for step, norm in enumerate(norms):
        give(model, [norm])
        seen.append(take(probe, model, optimizer, step))
    return seen


def test_adagc_by_its_published_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_history, "_WARM_UP", 3)
    probe = GradientHistory(warmup_max_norm=1.0)
    seen = run([2.0, 0.5, 0.8, 5.0], probe)
    assert all("gradients/threshold_excess" not in row for row in seen[:3])
    assert 1 / seen[3]["gradients/threshold_excess"] == pytest.approx(0.105)
    assert seen[3]["gradients/above_threshold"] == 1
    assert float(probe._gamma) == pytest.approx(0.5005)


def test_a_lasting_rise_is_followed_only_slowly() -> None:
    gamma, norm, steps = number(0.5), number(1e9), 0
    while gamma < 5:
        gamma, steps = adapted(gamma, norm), steps + 1
    assert steps == 2304


@settings(max_examples=30)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=40, max_size=60),
    st.sampled_from([None, 1.0]),
)
def test_both_rules_step_by_step(norms: list[float], lambda_abs: float | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_history, "_WARM_UP", 10)
        seen = run(norms, GradientHistory(warmup_max_norm=lambda_abs))
    expected = adagc(norms, 10, lambda_abs or math.inf)
    for step in range(10, len(norms)):
        excess = norms[step] / (1.05 * expected[step - 1][1])
        assert seen[step]["gradients/threshold_excess"] == pytest.approx(excess, rel=1e-9)
        assert seen[step]["gradients/above_threshold"] == (excess > 1)
        assert expected[step][0] == pytest.approx(min(1, 1 / excess))
    zs = zclip(norms)
    assert [row.get("gradients/norm_zscore") for row in seen[:25]] == [None] * 25
    found = [row["gradients/norm_zscore"] for row in seen[25:]]
    assert found == pytest.approx(zs, rel=1e-6, abs=1e-6)


def test_zero_and_what_is_not_finite_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_history, "_WARM_UP", 3)
    probe = GradientHistory()
    seen = run([0.0, 2.0, math.inf, 1.0, math.nan, 4.0, 4.2, math.inf, math.nan, 4.2], probe)
    # Three usable norms by the sixth step: their minimum is 1.
    assert math.isnan(seen[5]["gradients/threshold_excess"])
    assert seen[6]["gradients/threshold_excess"] == pytest.approx(4)
    assert seen[7]["gradients/threshold_excess"] == math.inf
    assert seen[7]["gradients/above_threshold"] == 1
    assert math.isnan(seen[8]["gradients/threshold_excess"])
    assert seen[8]["gradients/above_threshold"] == 1
    assert seen[9]["gradients/threshold_excess"] == pytest.approx(4.2 / (1.05 * 1.001))

    norms = [1.0, 3.0] * 13
    with_gaps = [*norms[:26], math.inf, math.nan, 5.0]
    zs = [row["gradients/norm_zscore"] for row in run(with_gaps, GradientHistory())[25:]]
    assert zs[1] == math.inf and math.isnan(zs[2])
    assert zs[3] == pytest.approx(zclip([*norms, 5.0])[1])


def test_each_parameter_keeps_its_history_when_others_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradient_history, "_WARM_UP", 3)
    model = parameters([0.0], [0.0], [0.0])
    model["a"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = GradientHistory()
    for step in range(8):
        if step == 4:
            model["a"].requires_grad_(True)
        give(model, [7.0] if step >= 4 else None, [2.0], [3.0] if step != 5 else None)
        seen = take(probe, model, optimizer, step)
    assert seen["gradients/threshold_excess/b"] == pytest.approx(1 / 1.05)
    assert seen["gradients/threshold_excess/c"] == pytest.approx(1 / 1.05)
    assert seen["gradients/threshold_excess/a"] == pytest.approx(1 / 1.05)
    give(model, [7.0], [2.0], None)
    assert "gradients/threshold_excess/c" not in take(probe, model, optimizer, 8)


def test_after_a_closure_and_without_any_gradient() -> None:
    model = parameters([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = GradientHistory()
    assert take(probe, model, optimizer) == {}
    for step in range(26):
        give(model, [1.0 + step % 2])
        seen = row(probe.after(passing(model, optimizer, step)))
    assert seen.keys() == {"gradients/norm_zscore"}


def test_an_accelerator_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_history, "_WARM_UP", 2)
    model = parameters([0.0], [0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = GradientHistory(warmup_max_norm=1.0)
    for step in range(30):
        give(model, [1.0 + step % 2], None if step == 7 else [2.0])
        under_way = passing(model, optimizer, step)
        assert under_way.gradient_norms is not None  # of another file
        with NoWaiting():
            seen = probe.before(under_way)
    assert len(row(seen)) == 5


def test_a_norm_that_cannot_be() -> None:
    with pytest.raises(DyndiagError, match=r"above 0, or None, but it is 0\.0: AdaGC's own is 1"):
        GradientHistory(warmup_max_norm=0.0)


def test_a_spike_in_one_layer_shows_where_it_is() -> None:
    """The first layer's gradient of its biases twenty times as large at one step."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    model: Any = nn.Sequential(mlp(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    probe, seen = GradientHistory(), []
    x = torch.randn(256, 8, generator=g)
    y = x[:, :4].argmax(1)
    for step in range(300):
        optimizer.zero_grad()
        cross_entropy(model, (x, y)).backward()
        if step == 250:
            model[0][0].bias.grad *= 20
        seen.append(take(probe, model, optimizer, step))
    name = "gradients/threshold_excess/0.0"
    usual = max(row[name] for row in seen[200:250])
    assert seen[250][name] > 8 * usual
    assert seen[251][name] < 1.5 * usual
    for other in ("gradients/threshold_excess/0.2", "gradients/threshold_excess/1"):
        assert seen[250][other] == pytest.approx(seen[249][other], rel=0.05)
    assert seen[250]["gradients/norm_zscore"] > 5
    assert max(abs(row["gradients/norm_zscore"]) for row in seen[200:250]) < 4
