"""What probes may take is bounded by what training takes."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dyndiag
from dyndiag.boundary import Boundary
from dyndiag.probes import StepWatch
from dyndiag.probes.continual.accuracy import AfterSwitch
from dyndiag.schedule import Budget, FixedInterval, Schedule, credited
from dyndiag.state import Measurements, TrainState
from tests.models import Transformer, batches, cross_entropy, mlp

COSTS = st.lists(st.floats(0.001, 0.5), min_size=1, max_size=40)
SHARES = st.floats(0.005, 0.5)


def spend(
    schedule: Schedule,
    costs: list[float],
    share: float,
    grace: float = 0.0,
    steps: int = 1500,
    step_seconds: float = 0.05,
) -> list[tuple[int, float, float]]:
    """(step, training seconds, cost) of the samples taken in a run."""
    taken = []
    for step in range(steps):
        seconds = step_seconds * (step + 1)
        if schedule.due(step, seconds, credited(seconds, share, grace)):
            cost = costs[len(taken) % len(costs)]
            schedule.paid(step, cost)
            taken.append((step, seconds, cost))
    return taken


@given(costs=COSTS, share=SHARES, grace=st.floats(0, 3))
def test_a_budget_is_kept_at_every_moment(costs: list[float], share: float, grace: float) -> None:
    taken = spend(Budget(share, gradients=costs[0] / 0.05), costs, share, grace)
    spent = 0.0
    for _, seconds, cost in taken:
        spent += cost
        # A sample's cost is foreseen by the last one's: one sample's surprise is allowed.
        assert spent <= max(grace, share * seconds) * (1 + 1e-9) + max(costs)


@given(cost=st.floats(0.001, 0.5), share=st.floats(0.01, 0.5))
def test_a_steady_cost_uses_the_share_and_no_more(cost: float, share: float) -> None:
    taken = spend(Budget(share, gradients=cost / 0.05), [cost], share)
    spent = sum(c for *_, c in taken)
    training = 0.05 * 1500
    assert spent <= share * training * (1 + 1e-9)
    affordable = min(share * training, cost * 750)  # intervals are odd: at worst every third step
    assert spent >= 0.6 * affordable - 2 * cost


@given(costs=COSTS, share=SHARES)
def test_intervals_are_odd(costs: list[float], share: float) -> None:
    steps = [step for step, *_ in spend(Budget(share, gradients=1), costs, share, 1.0)]
    assert all((b - a) % 2 == 1 for a, b in pairwise(steps))


@pytest.mark.parametrize(("steps", "at_least"), [(100, 20), (1000, 40), (10_000, 55)])
def test_a_toy_run_is_seen_from_its_beginning_to_its_end(steps: int, at_least: int) -> None:
    """A millisecond a step, fifteen for a sample, half of the whole budget's share and grace."""
    taken = spend(Budget(0.025, gradients=15), [0.015], 0.05, 2.0, steps, 0.001)
    sampled = [step for step, *_ in taken]
    assert len(sampled) >= at_least
    assert sampled[0] == 0
    assert all(b - a <= max(9, a / 4) for a, b in pairwise([*sampled, steps]))


def test_a_pause_leads_to_no_burst() -> None:
    budget = Budget(0.05, gradients=1)
    seconds, taken = 0.0, []
    for step in range(400):
        seconds += 1000.0 if step == 200 else 0.1
        if budget.due(step, seconds, seconds):
            budget.paid(step, 0.1)
            taken.append(step)
    assert len([step for step in taken if 200 <= step < 240]) <= 11


@given(share=SHARES, grace=st.floats(0.01, 5), seconds=st.floats(0, 1e5))
def test_credited_time_is_worth_the_grace_or_the_share(
    share: float, grace: float, seconds: float
) -> None:
    worth = share * credited(seconds, share, grace)
    assert share * seconds * (1 - 1e-12) <= worth <= max(grace, share * seconds) * (1 + 1e-12)


@given(cost=st.floats(0.001, 0.5), share=SHARES, grace=st.floats(0, 2))
def test_a_fixed_interval_only_grows_and_keeps_its_share(
    cost: float, share: float, grace: float
) -> None:
    taken = spend(FixedInterval(share), [cost], share, grace)
    distances = [b[0] - a[0] for a, b in pairwise(taken)]
    assert distances == sorted(distances)
    assert all(distance % 2 == 1 for distance in distances)
    assert sum(c for *_, c in taken) <= max(grace, share * 75) + cost


def test_after_a_switch_every_step_is_evaluated() -> None:
    schedule = AfterSwitch(0.2)
    steps = []
    for step in range(600):
        if step == 300:
            schedule.switched(300)
        seconds = 0.01 * (step + 1)
        if schedule.due(step, seconds, seconds):
            schedule.paid(step, 0.005)
            steps.append(step)
    assert [step for step in steps if 300 <= step < 350] == list(range(300, 350))
    between = [step for step in steps if 100 < step < 300]
    assert all(b - a >= 11 for a, b in pairwise(between))


def test_nothing_piles_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors and objects alive after most 300 steps as before them. Not after all: when a
    probe takes its first sample, and imports what it needs, depends on how quick the steps are."""
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.2)
    model = mlp()
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)  # unknown: said at every sample
    data = batches("mlp", 7)

    def alive(monitor: dyndiag.Monitor) -> tuple[int, int]:
        for step in range(300):
            loss = cross_entropy(model, data[step % 7])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=data[step % 7])
        del loss
        monitor.flush()
        gc.collect()
        objects = gc.get_objects()
        return sum(type(item) is torch.Tensor for item in objects), len(objects)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyndiag.DyndiagWarning)
        with dyndiag.Monitor(
            model, optimizer, cross_entropy, run=tmp_path / "run", tensorboard=False
        ) as monitor:
            counts = [alive(monitor) for _ in range(5)]
    tensors, objects = ([b - a for a, b in pairwise(of)] for of in zip(*counts, strict=True))
    assert statistics.median_high(tensors) <= 0
    assert statistics.median_high(objects) < 300  # less than one a step


def next_token(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def watch_a_training(device: str, forbid_waiting: Callable[[int], None]) -> None:
    """Its steps there, watched; what is seen of them stays there."""
    model = Transformer().to(device)
    tokens = torch.zeros(8, 9, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    boundary = Boundary()
    watch = StepWatch(model, optimizer, names, parameters, boundary, lambda steps: None)
    for step in range(90):
        forbid_waiting(step)
        next_token(model, tokens).backward()
        next_token(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken = watch.take()
        assert taken is not None
        state = TrainState(
            step, model, optimizer, parameters, names, weights_before=taken.weights_before
        )
        seen = taken.seen | (watch.update_ratio(state) if taken.weights_before else {})
        assert {"gradients/norm", "logits/max"} <= set(flat(seen))
        assert not any(value.device.type == "cpu" for value in tensors(seen))
        watch.step = step + 1
    assert not boundary.failures, boundary.notices


def flat(seen: Measurements) -> list[str]:
    return [n for name in seen for n in ((name,) if isinstance(name, str) else name)]


def tensors(seen: Measurements) -> list[torch.Tensor]:
    return [value for value in seen.values() if isinstance(value, torch.Tensor)]


def test_no_number_is_asked_of_a_device_while_it_trains() -> None:
    """Tensors of the meta device have none: what asks for one fails."""
    watch_a_training("meta", lambda step: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for_while_it_trains() -> None:
    def forbid_waiting(step: int) -> None:
        if step == 50:  # what is made once is there by now
            torch.cuda.set_sync_debug_mode("error")

    try:
        watch_a_training("cuda", forbid_waiting)
    finally:
        torch.cuda.set_sync_debug_mode("default")
