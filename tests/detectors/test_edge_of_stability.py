from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from dyndiag.detectors import EdgeOfStability, replay
from dyndiag.detectors.edge_of_stability import undecided
from dyndiag.values import Event
from tests.detectors.planted import Row

EVERY = 21
RISING = [*np.linspace(0.2, 0.95, 16), *[1.0, 1.05, 0.95, 1.02] * 10]


def run(
    ratios: Iterable[float],
    *,
    status: str = "",
    full_batch: float | None = 1.0,
    raises: float = 0.4,
    clipped: float = 0.0,
    **others: float,
) -> list[Row]:
    """χ every 21 steps. Status: a letter a sample, c(ertified), p(rovisional), u(nconverged)."""
    rows: list[Row] = []
    for k, ratio in enumerate(ratios):
        for step in range(EVERY):
            up, clip = step < raises * EVERY, step < clipped * EVERY
            row = {"train/loss": 1.0 + 0.01 * step * (1 if up else -1), "gradients/norm": 4.0}
            row["gradients/norm_clipped"] = 1.0 if clip else 4.0
            rows.append((k * EVERY + step, row))
        letter = status[k] if k < len(status) else "c"
        row |= {
            "stability/edge_ratio": float(ratio),
            "stability/edge_ratio.converged": float(letter == "c"),
            "stability/edge_ratio.provisional": float(letter == "p"),
            "stability/threshold": 20.0,
            **{name.replace("__", "/"): value for name, value in others.items()},
        }
        if full_batch is not None:
            row["stability/full_batch"] = full_batch
    return rows


def edges(rows: list[Row]) -> list[Event]:
    return replay(rows, [EdgeOfStability()])


def step_of(sample: int) -> int:
    return sample * EVERY + EVERY - 1


def test_a_crossing_is_one_event_from_where_the_median_enters_the_band() -> None:
    (event,) = edges(run(RISING))
    medians = [np.median(RISING[k - 4 : k + 1]) for k in range(4, len(RISING))]
    first = 4 + next(k for k, middle in enumerate(medians) if middle >= 0.8)
    assert event.start == step_of(first)
    assert event.end is None
    assert event.peak == step_of(RISING.index(1.05))
    assert event.severity == step_of(len(RISING) - 1) - event.start
    assert event.confidence >= 0.95
    assert event.details["peak_value"] == 1.05
    assert event.details["threshold"] == 20.0
    assert event.details["certified"] == event.details["samples"] == len(RISING) - first
    assert "in_doubt" not in event.details


@pytest.mark.parametrize("seed", range(5))
def test_flat_at_the_edge_from_the_start_is_no_crossing(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=200)
    assert edges(run(0.9 + 0.02 * noise)) == []


def test_a_rise_that_stops_below_the_band_is_none() -> None:
    assert edges(run(np.linspace(0.1, 0.6, 200))) == []


def test_a_single_ratio_at_one_is_none() -> None:
    assert edges(run([0.3] * 50 + [1.0] + [0.3] * 50)) == []
    assert edges(run([0.3] * 50 + [1.0] * 2 + [0.3] * 50)) == []


def test_three_in_a_row_are_asked_for() -> None:
    assert edges(run([0.3] * 10 + [0.9, 0.9, 0.6] * 20)) == []
    assert len(edges(run([0.3] * 10 + [0.9, 0.9, 0.9, 0.6] * 20))) == 1


def test_passing_through_the_band_is_no_stay() -> None:
    through = edges(run([*[0.3] * 50, *np.geomspace(0.3, 50, 20)]))
    assert all(event.end is not None for event in through)


def test_it_closes_where_the_median_leaves() -> None:
    ratios = [*RISING, *[0.5] * 20]
    (event,) = edges(run(ratios))
    assert event.end == step_of(len(RISING) + 2)  # the third .5 takes the median of five
    (event,) = edges(run([*RISING, *[1.6] * 20]))
    assert event.end == step_of(len(RISING) + 2)


def test_after_a_cut_of_the_rate_it_may_return() -> None:
    ratios = [*RISING, *np.linspace(0.5, 0.95, 12), *[1.0] * 10]
    first, second = edges(run(ratios))
    assert first.end is not None
    assert first.end < second.start
    assert second.end is None


def test_warm_up_is_not_judged() -> None:
    high_then_flat = [15.0] * 3 + [0.9] * 30
    rows = run(high_then_flat)
    for _, row in rows[: 3 * EVERY]:
        if "stability/edge_ratio" in row:
            row["stability/warmup"] = 1.0
    for _, row in rows[3 * EVERY :]:
        if "stability/edge_ratio" in row:
            row["stability/warmup"] = 0.0
    assert edges(rows) == []
    # nor does a low ratio of the warm-up make a later one a crossing
    rows = run([0.1] * 10 + [0.9] * 30)
    for step, row in rows:
        if "stability/edge_ratio" in row:
            row["stability/warmup"] = float(step < 10 * EVERY)
    assert edges(rows) == []


def test_unconverged_and_nan_ratios_enter_nothing() -> None:
    clean = edges(run(RISING))
    with_rubbish = [value for ratio in RISING for value in (ratio, 9.0, math.nan)]
    (event,) = edges(run(with_rubbish, status="cuc" * len(RISING)))
    assert event.start == 3 * (clean[0].start + 1) - 2 * EVERY - 1
    assert event.details["peak_value"] == 1.05


def test_provisional_ratios_neither_open_nor_top_nor_close() -> None:
    assert edges(run(RISING, status="p" * len(RISING))) == []
    late = 30
    (event,) = edges(run(RISING, status="p" * late))
    assert event.start == step_of(late)
    assert event.confidence < 0.95  # its window rests on provisional ratios
    peak = RISING.index(1.05)
    (event,) = edges(run(RISING, status="c" * peak + "p"))
    assert event.peak != step_of(peak)
    closing = [*RISING, *[0.5] * 5]
    (event,) = edges(run(closing, status="c" * len(RISING) + "ppppc"))
    assert event.end == step_of(len(closing) - 1)


def test_confidence_follows_the_evidence() -> None:
    def sure(**options: object) -> float:
        (event,) = edges(run(RISING, **options))  # type: ignore[arg-type]
        return event.confidence

    assert sure() >= 0.95
    assert 0.8 <= sure(raises=0.0) < 0.95
    assert 0.5 <= sure(full_batch=None) < 0.8
    assert sure(full_batch=0.0) < 0.5
    assert sure(clipped=0.7) < 0.5
    assert sure(clipped=0.3) >= 0.95


def test_doubts_are_named() -> None:
    (event,) = edges(run(RISING, full_batch=0.0, clipped=0.9))
    assert event.details["in_doubt"] == "minibatch, clipping"
    assert event.details["clipped"] == pytest.approx(0.9, abs=0.03)


def test_so_early_it_is_undecided() -> None:
    ratios = [0.5, 0.5, 0.5, 0.6, 0.8, 0.9, 1.0, 1.0, 1.0]
    (event,) = edges(run(ratios))
    assert event.confidence < 0.5
    (event,) = edges(run([*ratios, 1.0, 1.0]))
    assert event.confidence >= 0.95


def test_few_samples_at_the_edge_from_the_start_are_undecided() -> None:
    assert undecided([0.9, 1.0, 0.95, 1.0, 0.9, 1.0, 1.0])
    assert not undecided([0.9] * 10)
    assert not undecided([0.9, 1.0])
    assert not undecided([0.3, 0.5, 0.9, 1.0])
    assert not undecided([1.6] * 5)


def batch_run(values: Iterable[float], **others: float) -> list[Row]:
    """Batch sharpness of threshold 20, with an edge ratio that is flat at .9."""
    values = list(values)
    rows = run([0.9] * len(values), full_batch=0.0, **others)
    sampled = [row for _, row in rows if "stability/edge_ratio" in row]
    for value, row in zip(values, sampled, strict=True):
        row["curvature/batch_sharpness"] = 20.0 * value
    return rows


def test_minibatches_are_judged_by_batch_sharpness() -> None:
    (event,) = edges(batch_run([*np.linspace(0.1, 0.55, 16), *[0.56] * 10]))
    assert event.series == ("curvature/batch_sharpness",)
    assert 0.5 <= event.confidence < 0.8
    assert "minibatch" in str(event.details["in_doubt"])
    assert event.details["peak_value"] == pytest.approx(0.56)
    assert edges(batch_run([0.6] * 40)) == []


def test_batch_sharpness_says_nothing_behind_a_preconditioner() -> None:
    rows = batch_run(RISING, curvature__preconditioned_sharpness=380.0)
    assert edges(rows) == []
