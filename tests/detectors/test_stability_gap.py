from __future__ import annotations

import math

import numpy as np
import pytest

from dyndiag.detectors import StabilityGap, replay
from dyndiag.detectors.stability_gap import gap
from dyndiag.values import Event
from tests.detectors.planted import Row


def evaluations(
    accuracies: dict[str, list[float]], tasks: list[int], *, samples: float = 1000, every: int = 1
) -> list[Row]:
    rows = []
    for k, task in enumerate(tasks):
        row = {"continual/task": float(task)}
        for name, values in accuracies.items():
            if not math.isnan(values[k]):
                row[f"continual/accuracy/{name}"] = float(values[k])
                row[f"continual/samples/{name}"] = samples
        rows.append((k * every, row))
    return rows


def gaps(rows: list[Row], **thresholds: float) -> list[Event]:
    return replay(rows, [StabilityGap(**thresholds)])  # type: ignore[arg-type]


def dip(length: int, trough: float = 0.6, recovery: int = 50, end: float = 0.95) -> list[float]:
    """Falls at once, comes back linearly."""
    return [min(end, trough + (end - trough) * k / recovery) for k in range(length)]


def test_the_published_example() -> None:
    figures = gap(0.9, [0.5, 0.7, 0.85], average=1)
    assert figures.depth == pytest.approx(0.4)
    assert figures.transient == pytest.approx(0.35)
    assert figures.forgetting == pytest.approx(0.05)
    assert figures.area == pytest.approx(0.65)
    assert (figures.trough, figures.recovery) == (0, 2)


def test_the_published_example_as_an_event() -> None:
    accuracies = {"1": [0.1, 0.5, 0.9, 0.5, 0.7, 0.85], "2": [0.1, 0.1, 0.1, 0.4, 0.6, 0.8]}
    (event,) = gaps(evaluations(accuracies, [0, 0, 0, 1, 1, 1]), average=1)
    assert (event.start, event.peak, event.end) == (3, 3, 5)
    expected = {
        "depth": 0.4,
        "transient": 0.35,
        "forgetting": 0.05,
        "reference": 0.9,
        "trough": 0.5,
        "recovery_steps": 3,
        "area": 0.65,
        "min_acc": 0.5,
    }
    assert {name: event.details[name] for name in expected} == pytest.approx(expected)
    assert event.severity == pytest.approx(0.4)
    assert event.series == ("continual/accuracy/1",)


def test_the_reference_is_the_mean_of_the_last_five_before_the_switch() -> None:
    before = [0.1] * 10 + [0.9, 0.94, 0.98, 0.96, 0.92]
    a = before + dip(300)
    (event,) = gaps(evaluations({"A": a, "B": [math.nan] * 15 + [0.5] * 300}, [0] * 15 + [1] * 300))
    assert event.details["reference"] == pytest.approx(0.94)


def test_recovery_is_dated_where_it_came_within_a_point_of_the_final_level() -> None:
    a = [0.95] * 20 + dip(400)
    (event,) = gaps(evaluations({"A": a, "B": [0.5] * 420}, [0] * 20 + [1] * 400))
    # within .01 of .95: k >= 50 (.34 / .35) = 48.6, so 49 steps after the first dip
    assert event.end == 20 + 49
    assert event.details["recovery_steps"] == 50
    assert (event.start, event.peak) == (20, 20)
    assert event.confidence >= 0.95
    assert event.details["evaluations"] == 300


def test_it_is_open_while_the_accuracy_is_still_low() -> None:
    a = [0.95] * 20 + dip(30)
    rows = evaluations({"A": a, "B": [0.5] * 50}, [0] * 20 + [1] * 30)
    (event,) = gaps(rows)
    assert event.end is None
    assert "recovery_steps" not in event.details


def test_what_never_comes_back_is_forgetting_and_no_gap() -> None:
    a = [0.95] * 20 + [0.2] * 300
    assert gaps(evaluations({"A": a, "B": [0.5] * 320}, [0] * 20 + [1] * 300)) == []


def test_a_partial_return_is_a_gap_that_ends_with_its_window() -> None:
    a = [0.95] * 20 + dip(400, trough=0.4, end=0.7)
    (event,) = gaps(evaluations({"A": a, "B": [0.5] * 420}, [0] * 20 + [1] * 400))
    assert event.details["forgetting"] == pytest.approx(0.25)
    assert event.details["transient"] == pytest.approx(0.3)
    assert event.end == 20 + 49  # .3 k / 50 >= .29


def test_the_next_switch_ends_the_window_and_watches_every_old_task() -> None:
    length = 60
    a = [0.95] * length + dip(length, end=0.9) + dip(length, end=0.85)
    b = [math.nan] * length + [0.9] * length + dip(length, end=0.9)
    c = [math.nan] * (2 * length) + [0.9] * length
    tasks = [0] * length + [1] * length + [2] * length
    events = gaps(evaluations({"A": a, "B": b, "C": c}, tasks))
    assert [(event.start, event.details["task"]) for event in events] == [
        (60, "A"),
        (120, "A"),
        (120, "B"),
    ]
    assert events[1].details["reference"] == pytest.approx(0.9)
    assert events[1].details["min_acc"] == pytest.approx(0.6)


def test_a_return_to_an_earlier_task_is_a_switch_too() -> None:
    a = [0.95] * 20 + dip(100) + [0.95] * 100
    b = [math.nan] * 20 + [0.9] * 100 + dip(100, end=0.9)
    events = gaps(evaluations({"A": a, "B": b}, [0] * 20 + [1] * 100 + [0] * 100))
    assert [(event.start, event.details["task"]) for event in events] == [(20, "A"), (120, "B")]


def test_a_task_not_yet_trained_is_not_watched() -> None:
    untrained = [0.5] * 20 + [0.1] * 5 + [0.5] * 100
    accuracies = {"A": [0.9] * 125, "B": [0.5] * 125, "C": untrained}
    assert gaps(evaluations(accuracies, [0] * 20 + [1] * 105)) == []


@pytest.mark.parametrize(("samples", "allowed"), [(100, 8), (1000, 2)])
def test_a_constant_accuracy_rarely_alarms(samples: int, allowed: int) -> None:
    # Expected 2.2 and .14 of 200 windows (rates in the docstring); Poisson's 99.9 % points.
    rng = np.random.default_rng(0)
    alarmed = 0
    for _ in range(200):
        a = list(rng.binomial(samples, 0.9, 320) / samples)
        rows = evaluations({"A": a, "B": [0.5] * 320}, [0] * 20 + [1] * 300, samples=samples)
        alarmed += bool(gaps(rows))
    assert alarmed <= allowed


def test_the_floor_grows_with_the_noise_of_the_evaluation() -> None:
    a = [0.9] * 20 + dip(300, trough=0.8, end=0.9)
    accuracies = {"A": a, "B": [0.5] * 320}
    tasks = [0] * 20 + [1] * 300
    assert gaps(evaluations(accuracies, tasks, samples=100)) == []
    (event,) = gaps(evaluations(accuracies, tasks, samples=1000))
    floor = math.sqrt(0.09 / 1000) * (math.sqrt(2 * math.log(300)) + 1.5)
    assert event.details["threshold"] == pytest.approx(max(0.05, floor))


def test_an_evaluation_of_unknown_size_is_doubted() -> None:
    a = [0.95] * 20 + dip(300)
    rows = evaluations({"A": a, "B": [0.5] * 320}, [0] * 20 + [1] * 300)
    for _, row in rows:
        del row["continual/samples/A"]
    (event,) = gaps(rows)
    assert event.confidence < 0.8
    assert event.details["in_doubt"] == "evaluation size unknown"


def test_sparse_evaluations_say_their_period() -> None:
    a = [0.95] * 20 + dip(40, recovery=10)
    rows = evaluations({"A": a, "B": [0.5] * 60}, [0] * 20 + [1] * 40, every=10)
    (event,) = gaps(rows)
    assert event.details["period"] == 10
    assert event.details["evaluations"] == 30  # 300 steps


def test_a_detector_tells_only_what_changed() -> None:
    detector = StabilityGap()
    rows = evaluations({"A": [0.95] * 20 + dip(300), "B": [0.5] * 320}, [0] * 20 + [1] * 300)
    told = [event for step, row in rows for event in detector.update(step, row)]
    assert 2 <= len(told) <= 60
    assert len({event.name for event in told}) == 1
