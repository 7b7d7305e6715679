"""The monitor in training loops of every shape."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyndiag
from dyndiag.batches import MicroBatches
from tests.loops import BATCHES, sgd, train
from tests.models import cross_entropy, mlp


def test_the_five_lines(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        losses = train(monitor, model, optimizer)
    run = dyndiag.Run(tmp_path / "run")
    assert run["train/loss"].tolist() == losses
    assert run["train/loss"].index.tolist() == [0, 1, 2, 3, 4]
    assert run["train/learning_rate"].tolist() == [0.1] * 5
    sharpness, ratio = run["curvature/sharpness"], run["stability/edge_ratio"]
    assert ratio.tolist() == pytest.approx((sharpness * 0.1 / 2).tolist())
    assert set(run["stability/threshold"]) == {20.0}
    assert run.metadata["optimizer"]["class"] == "SGD"
    assert run.metadata["probe_batch"]["size"] == 6
    assert run.metadata["finished"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_probes_see_the_weights_after_the_step(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    probe = BATCHES[0]
    after = []
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", probe_batch=probe
    ) as monitor:
        for _ in range(3):
            cross_entropy(model, BATCHES[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            after.append(cross_entropy(model, probe).item())
            monitor.step(batch=BATCHES[1])
    losses = dyndiag.Run(tmp_path / "run")["predictions/loss"]
    assert losses[0] == pytest.approx(after[0], rel=1e-6)


def test_only_the_optimizer_is_called(tmp_path: Path) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            logits = self.net(x)
            return SimpleNamespace(loss=F.cross_entropy(logits, y), logits=logits)

    model = WithLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    monitor = dyndiag.Monitor(model, optimizer, run=tmp_path / "run")
    for step in range(5):
        optimizer.zero_grad()
        loss = model(*BATCHES[step % 4]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    monitor.close()
    run = dyndiag.Run(tmp_path / "run")
    assert run["train/loss"].tolist() == pytest.approx(losses, rel=1e-6)
    assert len(run["gradients/norm"]) == len(run["logits/max"]) == 5
    assert len(run["curvature/preconditioned_sharpness"]) >= 1
    assert run["stability/warmup"].tolist()[0] == 1.0
    assert "stability/realised_edge" in run.names


def test_accumulated_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 20.0)
    for name, whole in (("whole", True), ("parts", False)):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sgd(model)
        x, y = BATCHES[0]
        parts = [(x, y)] if whole else [(x[:3], y[:3]), (x[3:], y[3:])]
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / name) as monitor:
            losses = [cross_entropy(model, part) / len(parts) for part in parts]
            for loss in losses:
                loss.backward()
            optimizer.step()
            monitor.step(loss=sum(losses), batch=MicroBatches(tuple(parts)))
    one, two = (dyndiag.Run(tmp_path / name) for name in ("whole", "parts"))
    for part in (
        "train/loss",
        "gradients/norm",
        "curvature/sharpness",
        "curvature/batch_sharpness",
    ):
        assert two[part][0] == pytest.approx(one[part][0], rel=1e-3), part


def test_skipped_steps_count_and_are_marked(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        for step in range(4):
            loss = cross_entropy(model, BATCHES[0])
            loss.backward()
            if step != 2:
                optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=BATCHES[0])
    run = dyndiag.Run(tmp_path / "run")
    assert run["train/loss"].index.tolist() == [0, 1, 2, 3]
    assert run["train/skipped"].index.tolist() == [2]
    assert 2 not in run["gradients/norm"].index


def test_curvature_can_be_measured_at_a_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 20.0)
    model = mlp()
    optimizer = sgd(model)
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", probe_batch=BATCHES[0]
    ) as monitor:
        monitor.step(loss=1.0)
        train(monitor, model, optimizer, 1)
    run = dyndiag.Run(tmp_path / "run")
    assert 0 in run["stability/edge_ratio"].index
    assert run["train/learning_rate"].index.tolist() == [1]


def test_layers_that_are_unfrozen_later_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 20.0)
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with (
        pytest.warns(dyndiag.DyndiagWarning, match=r"other parameters are trainable.*4 tensors"),
        dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor,
    ):
        train(monitor, model, optimizer, 15)
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters()})
        tops = {}
        for step in range(15, 30):
            train(monitor, model, optimizer, 1)
            tops[step] = torch.linalg.eigvalsh(hessian_of(model))[-1].item()
    run = dyndiag.Run(tmp_path / "run")
    assert run["gradients/norm/0"].index.tolist() == list(range(23, 30))  # looked at step 22
    assert run["gradients/norm/2"].index.tolist() == list(range(30))
    sharpness = run["curvature/sharpness"]
    assert sharpness.index[-1] > 22
    assert sharpness.iloc[-1] == pytest.approx(tops[sharpness.index[-1]], rel=1e-2)
    assert "failures/Sharpness" not in run.names


def hessian_of(model: nn.Module) -> Tensor:
    """Of the first batch's loss over all parameters."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(
        cross_entropy(model.eval(), BATCHES[0]), parameters, create_graph=True
    )
    rows = [
        torch.autograd.grad(element, parameters, retain_graph=True)
        for element in torch.cat([g.flatten() for g in gradient])
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_steps_after_the_close_are_told_once_and_not_kept(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    monitor = dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run")
    train(monitor, model, optimizer, 3)
    monitor.close()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(monitor, model, optimizer, 3)
        monitor.start_task("late", BATCHES)
        assert monitor.flush()
        monitor.close()
    assert ["the monitor is closed" in str(warning.message) for warning in told] == [True]
    assert len(dyndiag.Run(tmp_path / "run")["train/loss"]) == 3


def test_on_event_may_close_the_monitor(tmp_path: Path) -> None:
    model = mlp()
    seen: list[Any] = []

    def stop(event: Any) -> None:
        seen.append(event.kind)
        monitor.close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyndiag.DyndiagWarning)
        monitor = dyndiag.Monitor(model, sgd(model), run=tmp_path / "run", on_event=stop)
        for step in range(80):
            monitor.step(loss=1 + 0.01 * (-1) ** step if step < 60 else 3.0)
            monitor.flush()
    assert seen == ["loss_spike"]
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["train/loss"]) < 80
    assert not any("Store" in notice["source"] for notice in run.metadata["notices"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_write_to_the_run(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    monitor = dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", tensorboard=False
    )
    train(monitor, model, optimizer, 2)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the others have not come along
            train(monitor, model, optimizer, 3)
            monitor.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert dyndiag.Run(tmp_path / "run").metadata["finished"] is None
    train(monitor, model, optimizer, 2)
    monitor.close()
    assert dyndiag.Run(tmp_path / "run")["train/loss"].index.tolist() == [0, 1, 2, 3]


def test_layers_that_are_added_later_are_watched(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(dyndiag.DyndiagWarning, match="other parameters are trainable since about"),
        dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor,
    ):
        train(monitor, model, optimizer, 15)
        model.add_module("3", nn.Linear(4, 4))
        optimizer.add_param_group({"params": model.get_submodule("3").parameters()})
        train(monitor, model, optimizer, 25)
    run = dyndiag.Run(tmp_path / "run")
    assert run["gradients/norm/3"].index.tolist() == list(range(34, 40))  # looked at step 33


def test_an_optimizer_without_learning_rates(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self) -> None:  # type: ignore[override]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.1 * p.grad)

    model = mlp()
    optimizer = Own(model.parameters())
    with (
        pytest.warns(dyndiag.DyndiagWarning, match="threshold of Own is not known"),
        dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor,
    ):
        train(monitor, model, optimizer, 5)
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["gradients/norm"]) == 5
    assert "train/skipped" not in run.names
    assert "train/learning_rate" not in run.names


def test_a_batch_that_cannot_be_copied_costs_only_what_needs_a_copy(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    batch = (*BATCHES[0], threading.Lock())
    with (
        pytest.warns(dyndiag.DyndiagWarning, match="lock"),
        dyndiag.Monitor(
            model, optimizer, lambda m, b: cross_entropy(m, b[:2]), run=tmp_path / "run"
        ) as monitor,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "dyndiag: no batch to measure on")
        train(monitor, model, optimizer, 5, batch=batch)
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["updates/ratio"]) == len(run["train/loss"]) == 5
    assert run["failures/Batch"].tolist() == [1.0]


def test_the_same_folder_goes_on(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    for _ in range(2):
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer, 3)
    assert dyndiag.Run(tmp_path / "run")["train/loss"].index.tolist() == [0, 1, 2, 3, 4, 5]
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", first_step=4
    ) as monitor:
        train(monitor, model, optimizer, 1)
    assert dyndiag.Run(tmp_path / "run")["train/loss"].index.tolist() == [0, 1, 2, 3, 4]


def test_events_come_to_the_callback_and_survive_a_resume(tmp_path: Path) -> None:
    def go(run: Path, cuts: list[int]) -> list[Any]:
        losses = [1 + 0.01 * (-1) ** k for k in range(60)] + [3.0] * 3 + [1.0] * 40
        seen: list[Any] = []
        for first, last in zip([0, *cuts], [*cuts, len(losses)], strict=True):
            model = mlp()
            with dyndiag.Monitor(model, sgd(model), run=run, on_event=seen.append) as monitor:
                for loss in losses[first:last]:
                    monitor.step(loss=loss)
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyndiag.DyndiagWarning)
        seen = go(tmp_path / "whole", [])
        go(tmp_path / "cut", [61, 64])
    whole, cut = (dyndiag.Run(tmp_path / name) for name in ("whole", "cut"))
    (spike,) = whole.event_list()
    assert (spike.kind, spike.start) == ("loss_spike", 60)
    assert cut.event_list() == [spike]
    assert seen[-1] == spike
    assert seen[0].end is None


def test_a_task_switch_is_evaluated_before_and_after(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        monitor.start_task("first", eval_batches=BATCHES[:1])
        train(monitor, model, optimizer, 3)
        expected = (model(BATCHES[0][0]).argmax(-1) == BATCHES[0][1]).float().mean().item()
        monitor.start_task("second", eval_batches=BATCHES[1:3])
        train(monitor, model, optimizer, 3)
        with pytest.raises(dyndiag.DyndiagError, match="started before"):
            monitor.start_task("first", eval_batches=BATCHES)
        with pytest.raises(dyndiag.DyndiagError, match="no evaluation batches"):
            monitor.start_task("third", eval_batches=[])
    run = dyndiag.Run(tmp_path / "run")
    assert run["continual/accuracy/first"][2] == pytest.approx(expected)
    assert run["continual/task"].tolist() == [0, 0, 0, 1, 1, 1]
    assert run["continual/samples/second"].tolist() == [12] * 4
    assert run.metadata["task_starts"] == {"first": 0, "second": 3}


def test_a_monitor_that_is_dropped_lets_go_of_the_model(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    monitor = dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run")
    train(monitor, model, optimizer, 2)
    monitor.close()
    alive = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert alive() is None


def test_a_forgotten_close_loses_nothing(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, torch, dyndiag
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = dyndiag.Monitor(model, optimizer, lambda m, b: m(b).sum(), run=sys.argv[1])
        for step in range(10):
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=torch.ones(1, 2))
        """
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["train/loss"]) == 10
    assert run.metadata["finished"]


def test_an_optimizer_that_trains_no_longer_is_told(tmp_path: Path) -> None:
    model = mlp()
    monitor = dyndiag.Monitor(model, sgd(model), cross_entropy, run=tmp_path, tensorboard=False)
    with pytest.warns(dyndiag.DyndiagWarning, match="none of the last 50 steps"), monitor:
        train(monitor, model, sgd(model), steps=60)
    assert dyndiag.Run(tmp_path)["train/skipped"].sum() == 60


def test_attention_in_compiled_code_is_absent_with_a_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager")
    with dyndiag.Monitor(compiled, optimizer, run=tmp_path, tensorboard=False) as monitor:
        for _ in range(2):
            loss = compiled(torch.ones(2, 3, 8)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    run = dyndiag.Run(tmp_path)
    assert not any(name.startswith("attention/") for name in run.names)
    assert "attention inside compiled code is not seen" in str(run.metadata["notices"])
    page = dyndiag.report(tmp_path).read_text("utf-8")
    assert "attention inside compiled code is not seen" in page
