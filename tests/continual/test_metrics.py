"""The published definitions, on series whose numbers are known by hand and by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndiag.continual import ContinualMetrics, largest_drop, metrics, noise_floor
from dyndiag.continual.tasks import Accuracies
from dyndiag.errors import DyndiagError

FIRST = [0.1, 0.5, 0.9, 0.5, 0.7, 0.85]
SECOND = [0.1, 0.1, 0.1, 0.4, 0.6, 0.8]


def every_step(**values: list[float]) -> dict[str, Accuracies]:
    return {name: (np.arange(len(v)), np.array(v)) for name, v in values.items()}


def known(*, beta: int = 10, average: int = 5) -> ContinualMetrics:
    return metrics(
        every_step(one=FIRST, two=SECOND), {"one": 0, "two": 3},
        windows=(2, 10), beta=beta, average=average,
    )  # fmt: skip


def test_known_series() -> None:
    found = known()
    assert found.acc == pytest.approx(0.825)
    assert found.forg == pytest.approx(0.05)
    assert found.min_acc == pytest.approx(0.5)
    assert found.wc_acc == pytest.approx(0.65)
    assert found.wf == pytest.approx({2: 0.2, 10: 0.2})
    assert found.wp == pytest.approx({2: 0.35, 10: 0.75})
    assert found.tasks[0].wf == pytest.approx({2: 0.4, 10: 0.4})
    assert found.tasks[1].wp == pytest.approx({2: 0.3, 10: 0.7})
    assert found.tasks[1].wf == {2: 0.0, 10: 0.0}  # it never fell: not −.2
    assert found.period == 1.0


def test_gap_of_the_known_series() -> None:
    first, second = known(average=1).tasks
    (gap,) = first.gaps
    assert second.gaps == ()
    assert (gap.depth, gap.transient, gap.forgetting) == pytest.approx((0.4, 0.35, 0.05))
    assert gap.area == pytest.approx(0.65)
    assert (gap.trough_step, gap.recovery_step, gap.recovery_steps) == (3, 5, 3)
    assert (gap.switched_to, gap.switch) == ("two", 3)
    assert math.isnan(gap.noise_floor)


def test_levels_are_means_of_five() -> None:
    a = [0.5] * 5 + [0.9, 0.94, 0.98, 0.96, 0.92] + [0.4] * 5 + [0.8, 0.82, 0.84, 0.86, 0.88]
    (task, _) = metrics(every_step(a=a, b=[0.0] * 20), {"a": 0, "b": 10}).tasks
    assert task.reference == task.gaps[0].reference == pytest.approx(0.94)
    assert task.level == task.gaps[0].end == pytest.approx(0.84)
    assert task.forgetting == pytest.approx(0.1)
    assert task.learned == 0.92


def test_windowed_plasticity_is_that_of_the_paper_and_not_of_its_code() -> None:
    series = np.array([0.8, 0.2, 0.9])
    assert largest_drop(-series, 3) == pytest.approx(0.7)  # the code's rule gives .1


@settings(max_examples=200)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=40), window=st.integers(2, 50))
def test_windows_by_brute_force(values: list[float], window: int) -> None:
    drops = [
        values[m] - values[n]
        for m, n in itertools.combinations(range(len(values)), 2)
        if n - m < window
    ]
    assert largest_drop(np.array(values), window) == max([0.0, *drops])


def test_windows_are_linear_in_the_evaluations() -> None:
    """A million evaluations in windows of half of them: quadratic would take hours."""
    values = np.random.default_rng(0).random(1_000_000)
    assert largest_drop(values, 500_000) > 0.9999


def test_three_tasks() -> None:
    """Each switch has a gap of its own; min-ACC looks from the task's end to now."""
    found = metrics(
        every_step(
            a=[0.9, 0.9, 0.5, 0.8, 0.6, 0.7], b=[0.1, 0.1, 0.7, 0.9, 0.3, 0.8],
            c=[0.0, 0.0, 0.0, 0.0, 0.5, 0.6],
        ),
        {"a": 0, "b": 2, "c": 4}, average=1,
    )  # fmt: skip
    assert [task.lowest for task in found.tasks[:2]] == [0.5, 0.3]
    assert found.min_acc == pytest.approx(0.4)
    assert found.acc == pytest.approx(0.7)
    assert found.forg == pytest.approx((0.9 - 0.7 + 0.9 - 0.8) / 2)
    assert found.wc_acc == pytest.approx(0.6 / 3 + 2 / 3 * 0.4)
    first, second = found.tasks[0].gaps
    assert (first.reference, first.trough, first.end) == (0.9, 0.5, 0.8)
    assert (second.reference, second.trough, second.end) == (0.8, 0.6, 0.7)


def test_the_lowest_accuracy_is_after_the_last_update_not_at_it() -> None:
    (task, _) = metrics(every_step(a=[0.5, 0.2, 0.7, 0.6], b=[0.0] * 4), {"a": 0, "b": 2}).tasks
    assert (task.learned, task.lowest, task.lowest_step) == (0.2, 0.6, 3)


def test_a_gap_is_looked_for_in_300_steps() -> None:
    a = [0.9] * 10 + [0.8] * 300 + [0.1] * 100
    (task, _) = metrics(every_step(a=a, b=[0.5] * 410), {"a": 0, "b": 10}).tasks
    assert task.gaps[0].trough == 0.8 and task.lowest == 0.1


def test_one_task_has_no_forgetting() -> None:
    found = metrics(every_step(a=[0.3, 0.7]), {"a": 0})
    assert found.acc == found.wc_acc == 0.7
    assert math.isnan(found.forg) and math.isnan(found.min_acc) and math.isnan(found.lca)
    assert found.wp == pytest.approx({10: 0.4, 100: 0.4})


def test_learning_curve_area() -> None:
    found = known(beta=2)
    assert found.tasks[0].lca == pytest.approx((0.1 + 0.5) / 2)
    assert found.tasks[1].lca == pytest.approx((0.4 + 0.6) / 2)  # from after its first update
    assert found.lca == pytest.approx(0.4)
    assert math.isnan(known(beta=4).lca)  # three evaluations each while in training


def test_seldom_evaluations_state_their_period() -> None:
    steps = np.array([0, 11, 22, 33, 44, 45, 46, 57])
    found = metrics({"a": (steps, np.linspace(0, 1, 8)), "b": (steps[4:], np.ones(4))},
                    {"a": 0, "b": 45})  # fmt: skip
    assert found.period == 11.0
    assert found.tasks[0].gaps[0].period == 6.0
    assert found.tasks[0].end == 44


def test_what_is_missing_is_left_out() -> None:
    a = [0.9, math.nan, 0.8, math.nan]
    found = metrics(
        {"a": (np.arange(4), np.array(a)), "later": (np.arange(4), np.ones(4))}
        | {"never": (np.empty(0, np.int64), np.empty(0))},
        {"a": 0, "never": 2},
    )
    (task,) = found.tasks  # `later` has not begun, `never` was not evaluated
    assert (task.learned, task.now, task.lowest, task.end) == (0.9, 0.8, 0.8, 1)
    nothing = metrics({}, {})
    assert nothing.tasks == () and math.isnan(nothing.acc) and math.isnan(nothing.wc_acc)


@pytest.mark.parametrize("option", [{"windows": (1,)}, {"beta": 0}, {"average": 0}])
def test_options_that_mean_nothing(option: dict[str, int]) -> None:
    with pytest.raises(DyndiagError, match="windows count evaluations"):
        metrics(every_step(a=[1.0]), {"a": 0}, **option)  # type: ignore[arg-type]


def test_noise_alone_seldom_dips_below_the_floor() -> None:
    """300 evaluations of a constant .9 on 1,000 fresh samples each."""
    floor = noise_floor(0.9, 1000, 300)
    assert floor == pytest.approx(math.sqrt(0.09 / 1000) * (math.sqrt(2 * math.log(300)) + 1.5))
    draws = np.random.default_rng(0).binomial(1000, 0.9, (2000, 300)) / 1000
    alarms = int(np.sum(0.9 - draws.min(axis=1) >= floor))
    # one evaluation goes below with probability 4e-7 (normal tail at 4.9): 2,000 windows, 0.3
    assert alarms <= 6
    assert math.isnan(noise_floor(0.9, math.nan, 300))


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=4))
def test_ranges(values: list[list[float]]) -> None:
    tasks = {f"t{i}": v for i, v in enumerate(values)}
    found = metrics(every_step(**tasks), {name: i for i, name in enumerate(tasks)})
    for name in ("acc", "min_acc", "wc_acc"):
        value = asdict(found)[name]
        assert math.isnan(value) or 0 <= value <= 1 + 1e-12
    assert math.isnan(found.forg) or -1 <= found.forg <= 1
    for windowed in (found.wf, found.wp):
        assert 0 <= windowed[10] <= windowed[100] <= 1
