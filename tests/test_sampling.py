"""Measurements are timed, guarded and told of, and cost nothing but time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dyndiag.batches import ForwardCall
from dyndiag.boundary import Boundary, DyndiagWarning
from dyndiag.probes.forward import ForwardWatch
from dyndiag.probes.logits.output import OutputLogits
from dyndiag.probes.weights.updates import UpdateRatio
from dyndiag.sampling import Sampler
from dyndiag.schedule import Every, WithinShare
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate
from tests.models import mlp


class Probe:
    name = "Probe"

    def __init__(self, measure: Callable[[torch.nn.Module], Measurements]) -> None:
        self.due = Every(1)
        self.notices: list[str] = []
        self._measure = measure

    def applies(self, state: TrainState) -> bool:
        return True

    def measure(self, state: TrainState) -> Measurements:
        self.notices.append("half a result")
        return self._measure(state.model)


class Setting:
    def __init__(self, measure: Callable[[torch.nn.Module], Measurements]) -> None:
        self.model, self.boundary = mlp(), Boundary()
        self.watch = ForwardWatch(self.model, [OutputLogits()])
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.probe = Probe(measure)
        self.sampler = Sampler([self.probe], 0.05, self.model, optimizer, None, self.boundary)
        self.state = TrainState(0, self.model, optimizer, (), ())
        self.kept: list[Any] = []

    def sample(self) -> None:
        self.sampler.measure_due(self.state, self.kept.append)


def looks(model: torch.nn.Module) -> Measurements:
    model.eval()
    top = model(torch.full((1, 8), 100.0)).max()
    return {"a/top": top, "a/edge": Estimate(1.0, products=7)}


def test_a_measurement_is_no_forward_of_the_training_and_leaves_its_mode() -> None:
    setting = Setting(looks)
    with pytest.warns(DyndiagWarning, match="half a result"):
        setting.sample()
    assert setting.watch.collect() == (None, None, {})
    assert setting.model.training
    (kept,) = setting.kept
    assert set(kept) == {"a/top", "a/edge"}


def test_costs_are_added_up_and_notices_told_once_and_let_go() -> None:
    setting = Setting(looks)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            setting.sample()
    assert len(told) == 1
    assert setting.probe.notices == []
    cost = setting.sampler.cost["Probe"]
    assert (cost["samples"], cost["products"]) == (3, 21)
    assert 0 < cost["seconds"] < 10


@pytest.mark.filterwarnings("ignore:dyndiag")
def test_a_probe_that_fails_is_counted_and_gives_nothing() -> None:
    def fails(model: torch.nn.Module) -> Measurements:
        raise RuntimeError("boom")

    setting = Setting(fails)
    setting.sample()
    assert setting.boundary.failures == {"Probe": 1}
    assert setting.kept == [{}]
    assert setting.sampler.cost == {}


@given(
    share=st.floats(1e-3, 0.05), cost=st.floats(1e-5, 0.1), grace=st.floats(0, 2),
    n=st.sampled_from([1, 11]),
)  # fmt: skip
def test_readings_keep_to_their_share(share: float, cost: float, grace: float, n: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyndiag.schedule.GRACE", grace)
        due = WithinShare(share, Every(n))
        taken, seconds, first, later = [], 0.0, max(1, int(250 * grace)), 0
        for step in range(3000):
            if due.due(step, seconds):
                late = seconds - 0.05 * (first - 1)
                assert later * cost <= max(grace / 8, share * late) + cost + 1e-9
                later += step >= first
                due.paid(cost)
                taken.append(step)
            seconds += 0.05
    assert taken[: first // n] == list(range(0, 3000, n))[: first // n]
    assert all((b - a) % (2 * n) == n for a, b in pairwise(taken))  # odd multiples of n
    if cost <= 0.99 * share * 0.05 * n:
        assert taken == list(range(0, 3000, n))
    elif grace == 0:
        assert len(taken) * cost >= share * seconds - 2 * n * (cost + share * 0.05)


def test_parameters_frozen_since_are_left_out() -> None:
    """The monitor looks now and then which parameters train; a probe differentiates at once."""
    setting = Setting(looks)
    parameters = tuple(setting.model.parameters())
    names = tuple(name for name, _ in setting.model.named_parameters())
    copies = tuple(p.detach().clone() for p in parameters)
    setting.state = replace(
        setting.state, parameters=parameters, names=names, weights_before=copies
    )
    parameters[0].requires_grad_(False)
    seen: list[TrainState] = []
    setting.probe.measure = lambda state: seen.append(state) or {}  # type: ignore[method-assign, func-returns-value]
    setting.sample()
    (state,) = seen
    assert all(a is b for a, b in zip(state.parameters, parameters[1:], strict=True))
    assert state.names == names[1:]
    assert state.weights_before is not None
    assert all(a is b for a, b in zip(state.weights_before, copies[1:], strict=True))


def test_what_reads_logits_and_weights_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a step, and 5 ms from each look at the clock to the next."""
    seconds = 0.0

    def now() -> float:
        nonlocal seconds
        seconds += 0.005
        return seconds

    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.0)
    for module in ("weights.updates", "logits.output"):
        monkeypatch.setattr(f"dyndiag.probes.{module}.time", SimpleNamespace(perf_counter=now))
    model = mlp()
    parameters = tuple(model.parameters())
    updates = UpdateRatio([name for name, _ in model.named_parameters()])
    logits, call = OutputLogits(), ForwardCall()
    taken = {"updates": 0, "logits": 0}
    for step in range(44, 1144):
        seconds += 1.0
        copies = updates.before(step, parameters)
        if copies is not None:
            common: Any = {"model": model, "optimizer": None, "names": ()}
            updates.measure(
                TrainState(step=step, parameters=parameters, weights_before=copies, **common)
            )
            taken["updates"] += 1
        logits.started(step, model)
        logits.finished(call, torch.randn(3, 4))
        taken["logits"] += "logits/log_partition" in logits.collect()
    # 0.01 % of 1,100 s, at 10 and 5 ms a reading; 100 would be every eleventh step.
    assert 10 <= taken["updates"] <= 12
    assert 19 <= taken["logits"] <= 23
