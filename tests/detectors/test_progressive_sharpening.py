from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from dyndiag.detectors import ProgressiveSharpening, replay
from dyndiag.values import Event
from tests.detectors.planted import Row, rows_of

EVERY = 21


def rises(rows: list[Row]) -> list[Event]:
    return replay(rows, [ProgressiveSharpening()])


def sharpness(values: Iterable[float], rate: float = 0.1) -> list[Row]:
    """With the edge ratio of gradient descent at this rate, all certified."""
    return [
        (
            EVERY * k,
            {
                "curvature/sharpness": float(value),
                "stability/edge_ratio": float(value) * rate / 2,
                "stability/warmup": 0.0,
                "stability/full_batch": 1.0,
                "train/learning_rate": rate,
            },
        )
        for k, value in enumerate(values)
    ]


def noisy(values: Iterable[float], sd: float = 0.01, seed: int = 0) -> np.ndarray:
    values = np.array(list(values))
    return values * np.exp(sd * np.random.default_rng(seed).normal(size=len(values)))


def test_a_rise_to_the_edge_is_one_event_that_ends_where_its_median_reaches_it() -> None:
    values = noisy([*np.linspace(5, 20, 50), *[20.0] * 60])
    (event,) = rises(sharpness(values))
    ratios = values * 0.1 / 2
    medians = [np.median(ratios[max(0, k - 4) : k + 1]) for k in range(len(ratios))]
    assert event.end == EVERY * next(k for k, middle in enumerate(medians) if middle >= 0.8)
    assert event.start <= EVERY * 8
    assert event.details["since"] == 0
    assert event.severity == pytest.approx(16 / 5, rel=0.1)
    assert event.confidence >= 0.95
    assert event.series == ("curvature/sharpness",)


def test_where_the_rise_ends_below_the_edge_it_closes() -> None:
    (event,) = rises(sharpness(noisy([*np.linspace(5, 10, 40), *[10.0] * 100])))
    assert event.end is not None
    assert EVERY * 40 < event.end <= EVERY * 75  # the window has to forget the rise
    assert event.peak <= event.end


@pytest.mark.parametrize("seed", range(5))
def test_flat_or_falling_is_none(seed: int) -> None:
    assert rises(sharpness(noisy([5.0] * 200, 0.05, seed))) == []
    assert rises(sharpness(noisy(np.linspace(10, 5, 200), 0.02, seed))) == []


def test_a_rise_of_less_than_a_fifth_is_none() -> None:
    assert rises(sharpness(np.linspace(5, 5.9, 30))) == []
    assert len(rises(sharpness(np.linspace(5, 6.2, 30)))) == 1


def test_a_slope_without_order_is_none() -> None:
    # Theil-Sen finds a rise of a fifth and more; of its 15 pairs only 10 rise.
    assert rises(sharpness([6, 4, 9, 5, 10, 7])) == []


def test_at_the_edge_a_rise_is_the_edge_s_business() -> None:
    assert rises(sharpness(np.linspace(17, 25, 50))) == []


def test_without_an_edge_ratio_it_works_too() -> None:
    rows = rows_of("curvature/sharpness", np.linspace(5, 50, 40), every=EVERY)
    (event,) = rises(rows)
    assert event.end is None


def test_six_samples_are_the_least() -> None:
    assert rises(sharpness([2, 3, 4, 5, 6])) == []
    (event,) = rises(sharpness([2, 3, 4, 5, 6, 7]))
    assert event.start == 5 * EVERY


def test_preconditioned_sharpness_comes_first() -> None:
    rows = sharpness(np.linspace(5, 2, 40))
    for k, (_, row) in enumerate(rows):
        row["curvature/preconditioned_sharpness"] = 100.0 + 20 * k
        row["stability/edge_ratio"] = 0.3
    (event,) = rises(rows)
    assert event.series == ("curvature/preconditioned_sharpness",)


def test_after_a_cut_only_the_new_rate_counts() -> None:
    hovering = sharpness(noisy([20.0] * 40))
    after = [(40 * EVERY + step, row) for step, row in sharpness(np.linspace(20, 39, 20), 0.05)]
    (event,) = rises(hovering + after)
    assert event.details["since"] == 40 * EVERY
    assert event.start >= 45 * EVERY


def test_a_rate_that_warms_up_is_no_sharpening() -> None:
    flat = [
        (step, row | {"train/learning_rate": 1e-3 * (step + 1)})
        for step, row in sharpness(noisy([5.0] * 40))
    ]
    falling = [
        (step, row | {"train/learning_rate": 1e-3 * (step + 1)})
        for step, row in sharpness(np.linspace(8, 5, 40))
    ]
    assert rises(falling) == []
    assert all(event.severity < 1.1 for event in rises(flat))


def test_a_decaying_rate_is_judged_by_sharpness_times_rate() -> None:
    rows = sharpness(5 * 1.03 ** np.arange(60))
    slow = [(s, row | {"train/learning_rate": 0.1 * 1.01**-k}) for k, (s, row) in enumerate(rows)]
    fast = [(s, row | {"train/learning_rate": 0.1 * 1.03**-k}) for k, (s, row) in enumerate(rows)]
    assert len(rises(slow)) == 1
    assert rises(fast) == []


def test_what_is_not_certified_opens_nothing_and_what_is_nothing_enters_nothing() -> None:
    rows = sharpness(np.linspace(5, 15, 30))
    for k, (_, row) in enumerate(rows):
        row["curvature/sharpness.converged"] = float(k == 20)
        row["curvature/sharpness.provisional"] = float(k != 20)
    (event,) = rises(rows)
    assert event.start == 20 * EVERY
    assert 0.8 <= event.confidence < 0.95
    assert event.details["certified"] == 1
    for k, (_, row) in enumerate(rows):
        row["curvature/sharpness.provisional"] = 0.0
        row["curvature/sharpness"] = -1.0 if k % 3 else math.nan
    assert rises(rows) == []


def test_warm_up_is_not_judged() -> None:
    rows = [(step, row | {"stability/warmup": 1.0}) for step, row in sharpness(range(5, 30))]
    assert rises(rows) == []


def test_what_falls_and_comes_half_way_up_again_has_not_risen() -> None:
    # The slope of all pairs is upwards, and still the end lies below the beginning.
    values = noisy([8.0, 8.0, 8.0, *np.linspace(2, 6, 30)])
    assert rises(sharpness(values, rate=0.05)) == []


def test_its_severity_is_what_it_rose_by() -> None:
    (event,) = rises(sharpness(noisy(np.linspace(4, 10, 60)), rate=0.05))
    assert event.severity == pytest.approx(10 / 4, rel=0.1)
