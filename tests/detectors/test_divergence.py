from __future__ import annotations

import math

import numpy as np
import pytest

from dyndiag.detectors import Divergence, replay
from dyndiag.values import Event
from tests.detectors.planted import decaying, losses


def divergences(series: object, every: int = 1) -> list[Event]:
    return replay(losses(series, every=every), [Divergence()])  # type: ignore[arg-type]


def test_a_loss_that_leaves_above_its_start_is_one_open_event() -> None:
    series = decaying(2000)
    series[1000:] = 8 + np.random.default_rng(0).normal(size=1000)
    (event,) = divergences(series)
    assert event.start == pytest.approx(1000, abs=2)
    assert event.end is None
    assert event.details["first_loss"] == series[0]
    assert event.severity == pytest.approx(event.details["peak_value"] / series[0])  # type: ignore[operator]


def test_fifty_steps_above_the_start_are_asked_for() -> None:
    series = decaying(2000)
    series[1000:1045] = 9.0
    assert divergences(series) == []
    series[1000:1060] = 9.0
    (event,) = divergences(series)
    assert (event.start, event.end) == (1002, 1062)  # a median of five is two points late


def test_a_run_that_explodes_from_its_first_steps() -> None:
    series = [1.2**k for k in range(200)]
    (event,) = divergences(series)
    assert event.start <= 10
    assert event.peak == 199


def test_a_catastrophic_first_step_is_seen_although_nothing_was_learned() -> None:
    rng = np.random.default_rng(0)
    series = np.r_[2.3, 10 + 0.1 * rng.normal(size=200)]
    (event,) = divergences(series)
    assert event.start <= 3


def test_collapse_to_chance_a_little_below_the_start_is_divergence() -> None:
    rng = np.random.default_rng(0)
    series = 2.35 * np.exp(-np.arange(1000) / 300) + 0.02 * rng.normal(size=1000)
    series[600:] = math.log(10) + 0.002 * rng.normal(size=400)
    (event,) = divergences(series)
    assert event.start == pytest.approx(600, abs=2)
    assert event.end is None


def test_a_plateau_from_the_start_is_no_divergence() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert divergences(2.3 + 0.05 * rng.normal(size=3000)) == []


def test_a_spike_above_the_start_that_comes_back_is_no_divergence() -> None:
    series = decaying(2000)
    series[1000:] += 20 * np.exp(-np.arange(1000) / 10)
    assert divergences(series) == []


def test_a_loss_that_stays_nan_is_divergence_at_once() -> None:
    series = decaying(500)
    series[400:] = math.nan
    (event,) = divergences(series[:403])
    assert event.start == 402
    assert event.details["non_finite_at"] == 402
    assert math.isfinite(event.severity)
    assert divergences(np.r_[series[:402], series[:98]]) == []  # two of them are not enough


def test_a_run_that_never_had_a_finite_loss() -> None:
    (event,) = divergences([math.nan] * 20)
    assert event.start == 0
    assert math.isfinite(event.severity)


def test_it_closes_when_the_loss_is_clearly_below_again() -> None:
    series = decaying(2000)
    series[1000:1200] = 9.0
    (event,) = divergences(series)
    assert event.end == pytest.approx(1200, abs=2)


def test_negative_losses_are_measured_by_what_was_gained() -> None:
    shifted = decaying(2000) - 6
    shifted[1000:] = 3.0
    (event,) = divergences(shifted)
    assert event.start == pytest.approx(1000, abs=2)
    assert event.severity == pytest.approx(3.0 - shifted[0])


def test_a_new_task_is_judged_by_its_own_first_losses() -> None:
    one = [2.0 * 0.95**k + 0.01 * (-1) ** k for k in range(100)]
    harder = [3.0 - 0.01 * k + 0.01 * (-1) ** k for k in range(100)]
    rows = [
        (step, {"train/loss": loss, "continual/task": float(step >= 100)})
        for step, loss in enumerate([*one, *harder])
    ]
    assert replay(rows, [Divergence()]) == []
    undeclared = [(step, {"train/loss": values["train/loss"]}) for step, values in rows]
    assert [event.start for event in replay(undeclared, [Divergence()])] == [102]


def test_a_new_task_ends_an_open_divergence() -> None:
    losses_of = [1.0 - 0.005 * k for k in range(60)] + [5.0] * 100 + [0.5] * 40
    rows = [
        (step, {"train/loss": loss, "continual/task": float(step >= 160)})
        for step, loss in enumerate(losses_of)
    ]
    (event,) = replay(rows, [Divergence()])
    assert event.end == 160
