"""The metrics of a run on disk, and of one that was trained."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyndiag
from dyndiag.continual import continual_metrics
from dyndiag.errors import DyndiagError
from dyndiag.probes.continual.accuracy import AfterSwitch, ContinualAccuracy
from dyndiag.state import Task, TrainState
from dyndiag.store import Writer
from tests.continual.test_metrics import FIRST, SECOND
from tests.reports import made


def known(folder: Path, metadata: dict[str, object]) -> dyndiag.Run:
    writer = Writer(folder)
    rows = [
        (
            i,
            {
                "continual/task": float(i >= 3), "continual/accuracy/b": a,
                "continual/accuracy/a": b, "continual/samples/b": 100.0,
            },
        )
        for i, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))
    ]  # fmt: skip
    writer.write(rows, [])
    writer.write_metadata(metadata)
    writer.close()
    return dyndiag.Run(folder)


@pytest.mark.parametrize("starts", [{}, {"task_starts": {"b": 0, "a": 3}}])
def test_known_series(tmp_path: Path, starts: dict[str, object]) -> None:
    run = known(tmp_path / "run", {"tasks": ["b", "a"]} | starts)
    found = continual_metrics(run, windows=(2, 10), average=1, beta=2)
    assert [task.name for task in found.tasks] == ["b", "a"]
    assert (found.acc, found.forg, found.min_acc, found.wc_acc) == pytest.approx(
        (0.825, 0.05, 0.5, 0.65)
    )
    assert found.wf == pytest.approx({2: 0.2, 10: 0.2})
    assert found.wp == pytest.approx({2: 0.35, 10: 0.75})
    (gap,) = found.tasks[0].gaps
    assert gap.recovery_steps == 3
    expected = math.sqrt(0.9 * 0.1 / 100) * (math.sqrt(2 * math.log(3)) + 1.5)
    assert gap.noise_floor == pytest.approx(expected)


def test_a_run_without_tasks(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "run", [(0, {"train/loss": 1.0})])
    with pytest.raises(DyndiagError, match="no accuracies by task: declare tasks with"):
        continual_metrics(dyndiag.Run(folder))


def test_needs_no_torch() -> None:
    code = "import sys, dyndiag.continual; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trained_gap(tmp_path: Path) -> None:
    """Two tasks that share inputs but not labels, half of each batch replayed: the first one
    dips within steps and comes back; the metrics and the event agree on it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 10, generator=g)
    teachers = torch.randn(2, 10, 4, generator=g)
    labels = [(x @ teacher).argmax(-1) for teacher in teachers]

    def data(task: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x[rows], torch.full((len(rows), 1), 2.0 * task)], dim=1), labels[task][
            rows
        ]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(11, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe, rows = ContinualAccuracy(AfterSwitch(1.0)), []
    for step in range(300):
        task = step // 150
        if step % 150 == 0:
            probe.start(Task("AB"[task], [data(task, torch.arange(400, 600))]), step)
        batch = data(task, torch.randint(400, (64,), generator=g))
        if task:
            old = data(0, torch.randint(400, (64,), generator=g))
            batch = (torch.cat([batch[0], old[0]]), torch.cat([batch[1], old[1]]))
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen = probe.measure(TrainState(step, model, optimizer, (), (), loss_fn=loss_fn))
        rows.append((step, {str(name): float(value) for name, value in seen.items()}))  # type: ignore[arg-type]
    run = dyndiag.Run(made.write(tmp_path / "run", rows))
    found = continual_metrics(run)
    (gap,) = found.tasks[0].gaps
    assert found.period == 1.0 and gap.switch == 150
    assert gap.depth > 0.2 and gap.transient > gap.noise_floor and gap.trough_step < 170
    assert gap.forgetting < 0.05
    assert found.min_acc == gap.trough == run["continual/accuracy/A"].loc[150:].min()
    (event,) = [event for event in run.event_list() if event.kind == "stability_gap"]
    assert event.peak == gap.trough_step
    assert event.details["depth"] == pytest.approx(gap.depth)
    assert event.details["recovery_steps"] == gap.recovery_steps
