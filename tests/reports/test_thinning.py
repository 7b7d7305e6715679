from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndiag.reports import thinning


def long(n: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), np.random.default_rng(0).normal(size=n)


def test_a_spike_of_one_step_survives() -> None:
    steps, values = long()
    values[54_321] = 50.0
    values[77_777] = -50.0
    index = thinning.kept(steps, values, 512)
    assert {54_321, 77_777, 0, len(steps) - 1} <= set(index.tolist())
    assert len(index) <= 3 * 512 + 1


def test_every_bucket_keeps_its_extremes() -> None:
    steps, values = long(10_000)
    kept = np.zeros(len(steps), bool)
    kept[thinning.kept(steps, values, 100)] = True
    for part in np.split(np.arange(10_000), 100):
        assert values[part][kept[part]].max() == values[part].max()
        assert values[part][kept[part]].min() == values[part].min()


def test_non_finite_values_and_windows_stay() -> None:
    steps, values = long()
    values[10] = np.nan
    values[60_000:] = np.inf
    index = set(thinning.kept(steps, values, 512, [(20_000, 20_400)]).tolist())
    assert 10 in index and 60_000 in index
    assert set(range(20_000, 20_401)) <= index


def test_short_series_are_left_alone() -> None:
    steps, values = long(1000)
    assert len(thinning.kept(steps, values, 512)) == 1000


def test_all_nan_is_thinned_too() -> None:
    steps, values = np.arange(50_000), np.full(50_000, np.nan)
    assert 100 <= len(thinning.kept(steps, values, 100)) <= 202
    assert len(thinning.largest(steps, values)) == 0


def test_largest_of_each_column() -> None:
    steps, values = long(10_000)
    index = thinning.largest(steps, values, 100)
    assert len(index) == 100
    expected = [part[np.argmax(values[part])] for part in np.array_split(np.arange(10_000), 100)]
    assert index.tolist() == [int(i) for i in expected]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_running_median_is_the_median(values: list[float]) -> None:
    got = thinning.running_median(np.array(values), half=2)
    for i, value in enumerate(got):
        side = min(2, i, len(values) - 1 - i)
        around = sorted(values[i - side : i + side + 1])
        assert value == around[(len(around) - 1) // 2]


def test_running_median_begins_where_the_series_does() -> None:
    falling = 2.3 * 0.5 ** np.arange(40)
    got = thinning.running_median(falling)
    assert got[0] == falling[0] and got[-1] == falling[-1]


def test_running_median_skips_nan_but_keeps_its_place() -> None:
    got = thinning.running_median(np.array([1.0, np.nan, 3.0]), half=1)
    assert got[0] == 1.0 and np.isnan(got[1]) and got[2] == 3.0


def test_gaps_of_a_regular_series() -> None:
    assert thinning.breaks(np.array([*range(50), 60, *range(61, 90)])) == [50]
    assert thinning.breaks(np.array([0, 3, 8, 13, 24, 29, 44, 47])) == []  # a schedule that varies
    assert thinning.breaks(np.array([0, 1, 2, 3, 4, 299])) == [5]
    dense_then_sparse = np.array([*range(100), *range(110, 200, 11)])
    assert thinning.breaks(dense_then_sparse) == []


def test_packed_values_come_back() -> None:
    values = np.array([1.5, np.nan, -np.inf, 1e300])
    back = np.frombuffer(base64.b64decode(thinning.packed(values)), "<f4")
    assert back[0] == 1.5 and np.isnan(back[1]) and back[2] == -np.inf
    assert np.isfinite(back[3]) and back[3] > 3e38


@pytest.mark.parametrize("steps", [[5, 6, 7], [0, 3, 70_000], [0, 3, 700]])
def test_packed_steps_come_back(steps: list[int]) -> None:
    coded = thinning.packed_steps(np.array(steps))
    if "u16" in coded or "u32" in coded:
        kind = "u16" if "u16" in coded else "u32"
        text = coded[kind]
        assert isinstance(text, str)
        delta = np.frombuffer(base64.b64decode(text), "<u2" if kind == "u16" else "<u4")
    else:
        delta = np.ones(len(steps) - 1, int)
    assert np.cumsum(np.r_[steps[0], delta]).tolist() == steps


def test_noise_is_told_from_a_course() -> None:
    x = np.linspace(0, 10, 500)
    rng = np.random.default_rng(0)
    assert not thinning.noisy(np.exp(-x))
    assert thinning.noisy(np.exp(-x / 5) * np.exp(0.3 * rng.normal(size=500)))
