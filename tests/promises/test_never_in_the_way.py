"""What probes may take is bounded by what training takes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dyndiag.probes.continual import AfterSwitch
from dyndiag.schedule import Budget, FixedInterval, Grace

COSTS = st.lists(st.floats(0.001, 0.5), min_size=1, max_size=40)


def spend(
    schedule: Budget | FixedInterval | AfterSwitch, costs: list[float], steps: int = 1500
) -> list[tuple[int, float, float]]:
    """(step, training seconds, cost) of the samples taken in a run of 0.05 s a step."""
    taken = []
    for step in range(steps):
        seconds = 0.05 * (step + 1)
        if schedule.due(step, seconds):
            cost = costs[len(taken) % len(costs)]
            schedule.paid(step, cost)
            taken.append((step, seconds, cost))
    return taken


@given(costs=COSTS, share=st.floats(0.005, 0.5), grace=st.floats(0, 3))
def test_a_budget_is_kept_at_every_moment(costs: list[float], share: float, grace: float) -> None:
    taken = spend(Budget(share, Grace(grace), gradients=costs[0] / 0.05), costs)
    spent = 0.0
    for _, seconds, cost in taken:
        spent += cost
        # A sample's cost is foreseen by the last one's: one sample's surprise is allowed.
        assert spent <= max(grace, share * seconds) + 2 * max(costs)


@given(cost=st.floats(0.001, 0.5), share=st.floats(0.01, 0.5))
def test_a_steady_cost_uses_the_share_and_no_more(cost: float, share: float) -> None:
    taken = spend(Budget(share, Grace(0.0), gradients=cost / 0.05), [cost])
    spent = sum(c for *_, c in taken)
    training = 0.05 * 1500
    assert spent <= share * training * (1 + 1e-9)
    affordable = min(share * training, cost * 750)  # intervals are odd, so at most every step
    assert spent >= 0.7 * affordable - 2 * cost


@given(costs=COSTS, share=st.floats(0.005, 0.5))
def test_intervals_are_odd(costs: list[float], share: float) -> None:
    steps = [step for step, *_ in spend(Budget(share, Grace(1.0), gradients=1), costs)]
    assert all((b - a) % 2 == 1 for a, b in pairwise(steps))


def test_a_toy_run_is_seen_whole() -> None:
    budget = Budget(0.05, Grace(2.0), gradients=20)
    taken = []
    for step in range(1000):  # a millisecond a step, five for a sample
        if budget.due(step, 0.001 * (step + 1)):
            budget.paid(step, 0.005)
            taken.append(step)
    assert len(taken) > 80
    assert taken[0] == 0
    assert taken[-1] > 950


def test_a_pause_leads_to_no_burst() -> None:
    budget = Budget(0.05, Grace(0.0), gradients=1)
    seconds, taken = 0.0, []
    for step in range(400):
        seconds += 1000.0 if step == 200 else 0.1
        if budget.due(step, seconds):
            budget.paid(step, 0.1)
            taken.append(step)
    assert len([step for step in taken if 200 <= step < 220]) <= 5


@given(cost=st.floats(0.001, 0.5), share=st.floats(0.005, 0.5), grace=st.floats(0, 2))
def test_a_fixed_interval_only_grows_and_keeps_its_share(
    cost: float, share: float, grace: float
) -> None:
    schedule = FixedInterval(share, Grace(grace))
    taken = spend(schedule, [cost])
    distances = [b[0] - a[0] for a, b in pairwise(taken)]
    assert distances == sorted(distances)
    assert all(distance % 2 == 1 for distance in distances)
    assert sum(c for *_, c in taken) <= max(grace, share * 75) + cost


def test_after_a_switch_every_step_is_evaluated() -> None:
    schedule = AfterSwitch(0.2, Grace(0.0))
    steps = []
    for step in range(600):
        if step == 300:
            schedule.switched(300)
        if schedule.due(step, 0.01 * (step + 1)):
            schedule.paid(step, 0.005)
            steps.append(step)
    assert [step for step in steps if 300 <= step < 350] == list(range(300, 350))
    between = [step for step in steps if 100 < step < 300]
    assert all(b - a >= 11 for a, b in pairwise(between))
