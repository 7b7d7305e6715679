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
from dyndiag.probes.continual import AfterSwitch, ContinualAccuracy
from dyndiag.state import Task, TrainState
from tests.models import batches, cross_entropy, mlp

BATCHES = batches("mlp", 4)


def accuracies(tasks: list[Task], model: Any) -> dict[str, float]:
    probe = ContinualAccuracy(AfterSwitch(0.2))
    for step, task in enumerate(tasks):
        probe.start(task, step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(0, model, optimizer, (), (), loss_fn=cross_entropy)
    return {name: float(value) for name, value in probe.measure(state).items()}  # type: ignore[arg-type]


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
