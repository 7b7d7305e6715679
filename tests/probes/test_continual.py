"""Accuracy on the tasks so far, and when it is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dyndiag
from dyndiag.errors import DyndiagError
from dyndiag.probes.continual.accuracy import AfterSwitch, ContinualAccuracy
from dyndiag.state import Task, TrainState
from tests.models import batches, cross_entropy, mlp

BATCHES = batches("mlp", 4)


def accuracies(tasks: list[Task], model: Any) -> dict[str, float]:
    probe = ContinualAccuracy(AfterSwitch(0.2))
    for step, task in enumerate(tasks):
        probe.start(task, step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(0, model, optimizer, (), (), loss_fn=cross_entropy)
    return {str(name): float(value) for name, value in probe.measure(state).items()}  # type: ignore[arg-type]


def right(model: Any, *data: Any) -> float:
    hits = torch.cat([model(x).argmax(-1) == y for x, y in data])
    return hits.float().mean().item()


def test_accuracy_of_every_task_so_far() -> None:
    model = mlp()
    found = accuracies([Task("a", BATCHES[:1]), Task("b", BATCHES[1:])], model)
    assert found == {
        "continual/task": 1.0,
        "continual/accuracy/a": pytest.approx(right(model, BATCHES[0])),
        "continual/samples/a": 6.0,
        "continual/accuracy/b": pytest.approx(right(model, *BATCHES[1:])),
        "continual/samples/b": 18.0,
    }


@pytest.mark.parametrize("name", ["", "two\nlines", 3])
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(DyndiagError, match="task's name"):
        ContinualAccuracy(AfterSwitch(0.2)).start(Task(name, BATCHES), 0)


def once() -> Iterator[Any]:
    yield from BATCHES


@pytest.mark.parametrize("kind", ["loader", "generator"])
def test_evaluation_batches_may_come_from_anything(kind: str, tmp_path: Path) -> None:
    """And drawing them leaves no trace, though a loader draws from the global random stream."""
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        monitor.start_task("a", loader if kind == "loader" else once())
        for _ in range(2):
            loss = cross_entropy(model, BATCHES[0])
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=BATCHES[0])
    assert torch.equal(torch.get_rng_state(), before)
    run = dyndiag.Run(tmp_path / "run")
    assert run["continual/samples/a"].tolist() == [24.0, 24.0]
    assert run["continual/accuracy/a"][1] == pytest.approx(right(model, *BATCHES))


def measured_at(steps: list[int], switch: int) -> tuple[ContinualAccuracy, list[float | None]]:
    """A probe that measured after these steps, with a second task from `switch` on."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe, periods = ContinualAccuracy(AfterSwitch(0.2)), []
    probe.start(Task("a", BATCHES[:1]), 0)
    for step in steps:
        if len(probe.tasks) == 1 and step >= switch:
            probe.start(Task("b", BATCHES[1:]), switch)
        state = TrainState(step, model, optimizer, (), (), loss_fn=cross_entropy)
        seen = probe.measure(state)
        periods.append(seen.get("continual/period"))
    return probe, periods  # type: ignore[return-value]


def test_steps_since_the_last_evaluation_are_a_series() -> None:
    _, periods = measured_at([0, 11, 22, 22, 23, 24, 35], switch=23)
    assert periods == [None, 11.0, 11.0, None, 1.0, 1.0, 11.0]


def test_evaluations_that_the_budget_left_out_are_told_once() -> None:
    probe, _ = measured_at([0, 11, 22, *range(50, 300, 3)], switch=50)
    assert probe.notices == [
        "after the switch to task 'b' accuracy was measured after 34 of 100 steps, as the budget "
        "allows, so the lowest accuracies may have been missed: pass fewer eval_batches, or a "
        "larger budget"
    ]
    probe.start(Task("c", BATCHES), 310)
    assert len(probe.notices) == 1


def test_a_task_that_was_evaluated_at_every_step_needs_no_words() -> None:
    probe, _ = measured_at([0, 11, 49, *range(50, 150), 161, 172], switch=50)
    assert probe.notices == []
    short, _ = measured_at([0, *range(50, 90)], switch=50)
    short.start(Task("c", BATCHES), 90)
    assert short.notices == []
    short.start(Task("d", BATCHES), 95)
    assert len(short.notices) == 1 and "0 of 5 steps" in short.notices[0]


def test_every_step_for_a_hundred_after_a_switch_and_then_every_eleventh() -> None:
    due, steps = AfterSwitch(0.5), []
    due.switched(200)
    for step in range(150, 400):
        if due.due(step, 1.0 * step, 1.0 * step):
            due.paid(step, 1e-3)
            steps.append(step)
    assert [step for step in steps if step >= 200] == [*range(200, 300), *range(310, 400, 11)]
