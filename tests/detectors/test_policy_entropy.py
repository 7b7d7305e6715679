from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from dyndiag.detectors import EntropyCollapse, EntropyExplosion, replay
from dyndiag.values import Event
from tests.detectors.planted import rows_of


def events(values: Iterable[float], every: int = 1, **thresholds: float) -> list[Event]:
    rows = rows_of("policy/entropy", values, every=every)
    return replay(rows, [EntropyCollapse(**thresholds), EntropyExplosion()])  # type: ignore[arg-type]


def noisy(values: np.ndarray, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    return values * np.exp(noise * np.random.default_rng(seed).normal(size=len(values)))


# Collapse.


def test_from_the_first_sample_below_a_tenth_to_the_first_above_a_fifth() -> None:
    start = [1.8, 2.2] * 5
    (event,) = events([*start, 0.21, 0.19, 0.1, 0.15, 0.39, 0.4, 0.41, 0.1])[:1]
    assert (event.kind, event.start, event.peak, event.end) == ("entropy_collapse", 11, 12, 16)
    assert event.severity == pytest.approx(1 - 0.1 / 2)
    assert event.confidence == 0.95
    assert event.series == ("policy/entropy",)
    assert event.details == {
        "threshold": pytest.approx(0.2), "value": 0.19, "start_value": pytest.approx(2.0),
        "peak_value": 0.1, "by": "level",
    }  # fmt: skip


def test_one_batch_of_certain_text_is_unsure() -> None:
    series = [2.0] * 60
    series[30] = 0.05
    (event,) = events(series)
    assert (event.start, event.end, event.confidence) == (30, 31, 0.4)


def test_the_trend_tells_a_hundred_steps_before_the_level() -> None:
    """exp(−t / 200) is at a tenth of its start s at t = 200 ln(10 / s)."""
    for every in (1, 10):
        falling = np.exp(-np.arange(0, 700, every) / 200)
        (event,) = events(falling, every=every)
        at_a_tenth = 200 * math.log(10 / falling[:10].mean())
        assert at_a_tenth - 100 <= event.start <= at_a_tenth - 100 + every
        assert event.details["by"] == "trend" and event.confidence == 0.95 and event.end is None


def test_a_trend_that_came_to_nothing_is_unsure() -> None:
    time = np.arange(900.0)
    series = np.where(
        time < 390, np.exp(-time / 200), np.exp(-390 / 200) * 1.2 ** ((time - 390) / 20)
    )
    (event,) = events(np.minimum(series, 1.0))
    assert event.details["by"] == "trend" and event.confidence == 0.4
    assert event.end is not None and event.peak == 390


@pytest.mark.parametrize("lasting", [200.0, 50.0, 20.0])
def test_a_fall_to_a_new_level_is_no_collapse(lasting: float) -> None:
    for level in (0.7, 0.5, 0.3):
        fall = level + (1 - level) * np.exp(-np.arange(1000) / lasting)
        assert events(noisy(fall)) == []


def test_noise_is_no_collapse_and_no_explosion() -> None:
    for seed in range(5):
        assert events(noisy(np.full(1000, 1.5), seed=seed)) == []


def test_a_straight_descent_is_told_before_it_arrives() -> None:
    descent = noisy(np.maximum(1 - np.arange(3000) / 2000, 0.01))
    (event,) = events(descent)
    assert 1600 < event.start < 1800  # a tenth is reached at 1800


def test_entropy_of_zero_and_broken_values() -> None:
    (event,) = events([1.0] * 12 + [math.nan, 0.0, 0.0, math.inf, 0.0])
    assert (event.start, event.peak, event.severity, event.end) == (13, 16, 1.0, None)
    assert events([0.0] * 200) == []  # certain from the start: nothing to compare with
    assert events([0.0] * 20 + [1.0] * 50) == []
    assert replay([(0, {"train/loss": 1.0})], [EntropyCollapse(), EntropyExplosion()]) == []


def test_the_first_samples_open_nothing() -> None:
    assert events([1.0, 1e-3, 9.0, 1.0, 1e-3, 9.0, 1.0, 1e-3, 9.0]) == []


def test_predictions_entropy_is_another_quantity() -> None:
    rows = rows_of("predictions/entropy", [1.0] * 20 + [0.01] * 20)
    assert replay(rows, [EntropyCollapse(), EntropyExplosion()]) == []


def test_thresholds_are_kept() -> None:
    detector = EntropyCollapse(share=0.15)
    assert detector.parameters == {
        "start": 10, "share": 0.15, "back": 0.2, "horizon": 100, "least": 20,
    }  # fmt: skip
    assert [e.start for e in events([1.0] * 10 + [0.14] * 5, share=0.15)] == [10]


# Explosion.


def test_from_twice_the_start_to_below_one_and_a_half() -> None:
    (event,) = events([1.0] * 10 + [2.0, 2.1, 4.0, 2.5, 1.6, 1.5, 1.4, 1.0])
    assert (event.kind, event.start, event.peak, event.end) == ("entropy_explosion", 11, 12, 16)
    assert event.severity == 4.0 and event.confidence == 0.95
    assert event.details == {
        "threshold": 2.0, "value": 2.1, "start_value": 1.0, "peak_value": 4.0,
    }  # fmt: skip


def test_growth_that_stays_below_twice_the_start_is_none() -> None:
    assert events(noisy(1 + 0.5 * np.arange(1000) / 1000, noise=0.05)) == []


def test_it_stays_open_while_it_lasts() -> None:
    (event,) = events(np.r_[np.ones(20), np.linspace(1, 3, 100)])
    assert event.end is None and event.peak == 119
