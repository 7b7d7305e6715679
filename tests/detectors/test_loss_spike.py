from __future__ import annotations

import math

import numpy as np
import pytest

from dyndiag.detectors import LossSpike, replay
from dyndiag.values import Event
from tests.detectors.planted import Row, decaying, losses, score


def spikes(rows: list[Row], **thresholds: float) -> list[Event]:
    return replay(rows, [LossSpike(**thresholds)])  # type: ignore[arg-type]


def burst(series: np.ndarray, start: int, height: float, decay: float = 10.0) -> np.ndarray:
    """A jump that comes back exponentially."""
    raised = series.copy()
    time = np.arange(len(series) - start)
    raised[start:] += height * np.exp(-time / decay)
    return raised


def test_a_lone_point_high_above_a_decaying_loss_is_one_event_of_low_confidence() -> None:
    series = decaying()
    series[2000] += 0.8
    (event,) = spikes(losses(series))
    assert (event.start, event.peak, event.end) == (2000, 2000, 2001)
    assert event.confidence < 0.5
    assert event.details["value"] == series[2000]
    assert event.severity == pytest.approx(series[2000] / np.median(series[1976:2000]))


def test_a_lone_point_near_the_threshold_is_an_outlier_and_no_event() -> None:
    series = decaying(noise=0.05)
    series[2000] += 0.6
    assert spikes(losses(series)) == []
    series[2001] += 0.6
    (event,) = spikes(losses(series))
    assert (event.start, event.details["points"]) == (2000, 2)
    assert event.confidence >= 0.8


def test_a_lone_point_of_twice_the_level_counts_where_points_are_sparse() -> None:
    rng = np.random.default_rng(3)
    series = 1 + 0.12 * rng.normal(size=300)
    series[200] = 2.0
    assert spikes(losses(series)) == []
    (event,) = spikes(losses(series, every=50))
    assert event.start == 200 * 50
    assert event.confidence >= 0.95


def test_a_second_spike_soon_after_a_burst_is_seen() -> None:
    series = decaying()
    series[2000:2005] += 5.0
    series[2010] += 0.8
    first, second = spikes(losses(series))
    assert (first.start, first.end, first.details["points"]) == (2000, 2005, 5)
    assert second.start == 2010


def test_ten_planted_spikes_are_found_at_their_start_and_nothing_else() -> None:
    starts = list(range(300, 3900, 360))
    series = decaying()
    for start in starts:
        series = burst(series, start, 2.5)
    result = score(spikes(losses(series)), starts, within=1)
    assert result.recall == 1.0
    assert result.precision == 1.0
    assert set(result.delays) == {0}


def test_a_spike_carries_what_a_report_says_about_it() -> None:
    series = burst(decaying(noise=0.005), 2000, 3.0)
    (event,) = spikes(losses(series))
    level = np.median(series[1976:2000])
    assert event.details["median_before"] == pytest.approx(level)
    assert event.details["threshold"] == pytest.approx(1.25 * level)
    assert event.details["peak_value"] == series[event.peak]
    assert event.details["factor"] == pytest.approx(series[event.peak] / level)
    assert event.details["deviations"] > 100  # type: ignore[operator]
    # back within 10 % of the level: 3 exp(-t / 10) = .21 at t = 26.5
    assert event.end is not None
    assert abs(event.end - 2027) <= 2
    # and to .04 below it, where half a level window of decay had led: 3 exp(-t / 10) ~ .02
    assert 35 <= event.details["steps_to_recover"] <= 60  # type: ignore[operator]


def test_progress_that_is_not_made_up_has_no_recovery() -> None:
    series = np.where(np.arange(1000) < 500, 1.0, 1.08) + 0.005 * np.sin(np.arange(1000))
    series[500:510] = 3.0
    (event,) = spikes(losses(series))
    assert event.end == 510
    assert "steps_to_recover" not in event.details


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_noise_is_no_spike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert spikes(losses(2 + 0.05 * rng.normal(size=20_000))) == []
    assert spikes(losses(1 + 0.3 * rng.normal(size=5_000))) == []


def test_two_level_noise_is_a_habit() -> None:
    rng = np.random.default_rng(0)
    series = 1 + 0.01 * rng.normal(size=3000)
    series[::10] *= 1.45
    found = spikes(losses(series))
    assert all(event.start < 60 for event in found)
    assert all(event.confidence < 0.5 for event in found)


def test_rounding_is_no_spike() -> None:
    rng = np.random.default_rng(0)
    smooth = 3 * np.exp(-np.arange(4000) / 500) + 0.15 + 0.02 * rng.normal(size=4000)
    assert spikes(losses(np.round(smooth, 1))) == []


def test_a_level_shift_is_one_event_that_stays_open() -> None:
    rng = np.random.default_rng(0)
    series = np.where(np.arange(3000) < 1000, 2.0, 3.5) + 0.02 * rng.normal(size=3000)
    (event,) = spikes(losses(series))
    assert (event.start, event.end) == (1000, None)


def test_a_spike_after_one_that_never_came_back_ends_it() -> None:
    rng = np.random.default_rng(0)
    series = np.where(np.arange(1500) < 500, 2.0, 3.5) + 0.02 * rng.normal(size=1500)
    series[1000:1040] += 4.0
    first, second = spikes(losses(series))
    assert (first.start, first.end) == (500, 999)
    assert (second.start, second.end) == (1000, 1040)


def test_tops_without_a_return_are_one_spike() -> None:
    series = burst(burst(decaying(), 2000, 2.0, decay=40), 2015, 3.0)
    (event,) = spikes(losses(series))
    assert event.start == 2000
    assert event.peak == pytest.approx(2015, abs=1)


def test_after_a_close_the_same_rows_open_nothing() -> None:
    # back in the band by the median of five, with two of the five still far out
    series = [1.0 + 0.01 * math.sin(k) for k in range(300)]
    series[100:103] = [4.0, 4.0, 4.0]
    series[104] = series[106] = 3.0
    (event,) = spikes(losses(series))
    assert event.start == 100
    assert event.end is not None


def test_losses_below_zero_are_judged_by_differences() -> None:
    rng = np.random.default_rng(0)
    series = 1 - np.arange(2000) / 400 + 0.02 * rng.normal(size=2000)
    series[1500:1510] += 5.0
    (event,) = spikes(losses(series))
    assert event.start == 1500
    assert event.end == 1510
    assert math.isfinite(event.severity)


def test_a_spike_out_of_an_exactly_constant_loss_is_seen() -> None:
    (event,) = spikes(losses([1.0] * 50 + [5.0] * 4 + [1.0] * 20))
    assert (event.start, event.end) == (50, 54)


def test_nothing_starts_right_after_the_rate_jumped() -> None:
    series = burst(decaying(), 2000, 3.0)
    rows = [(k, {**row, "train/learning_rate": 0.1}) for k, row in losses(series)]
    assert len(spikes(rows)) == 1
    for _, row in rows[1995:]:
        row["train/learning_rate"] = 1.0
    assert spikes(rows) == []
    for _, row in rows[1995:]:
        row["train/learning_rate"] = 0.01  # a cut explains nothing
    assert len(spikes(rows)) == 1


def test_a_task_switch_just_before_is_told() -> None:
    series = burst(decaying(), 2000, 3.0)
    rows = [(k, {**row, "continual/task": float(k >= 1995)}) for k, row in losses(series)]
    (event,) = spikes(rows)
    assert event.details["in_doubt"] == "task switch"


def test_a_non_finite_loss_teaches_nothing() -> None:
    series = burst(decaying(), 2000, 3.0)
    broken = [value for k, value in enumerate(series) for value in (value, math.nan)[: 1 + k % 2]]
    (event,) = spikes([(k, {"train/loss": float(value)}) for k, value in enumerate(broken)])
    assert event.details["peak_value"] == series[2000]


def test_nothing_is_said_before_there_are_sixteen_residuals() -> None:
    calm = [1.0, 1.01] * 9
    assert spikes(losses([*calm[:16], 9.0, *calm])) == []
    assert len(spikes(losses([*calm[:17], 9.0, *calm]))) == 1


def test_points_from_the_end_on_teach_the_level() -> None:
    series = np.r_[np.full(100, 1.0), np.full(5, 4.0), np.full(14, 1.09), np.full(3, 4.0)]
    series += 0.001 * np.sin(np.arange(len(series)))
    _, second = spikes(losses(series))
    assert second.details["median_before"] == pytest.approx(1.09, abs=0.002)


def test_ratios_are_forgotten_where_the_loss_crosses_zero() -> None:
    rng = np.random.default_rng(0)
    series = 1 - np.arange(600) / 400 + 0.02 * rng.normal(size=600)
    series[430] += 1.0
    (event,) = spikes(losses(series))
    assert event.start == 430
    # residuals are differences of sd .02 about a level that lags by 12 points of 1 / 400
    assert event.details["deviations"] == pytest.approx(1 / 0.02, rel=0.3)
