"""The monitor in training loops of every shape, and what it says of bad input."""

from __future__ import annotations

import gc
import math
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
from torch.utils.data import DataLoader

import dyndiag
from dyndiag.batches import MicroBatches
from tests.models import batches, cross_entropy, mlp

BATCHES = batches("mlp", 4)


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def train(
    monitor: dyndiag.Monitor, model: nn.Module, optimizer: Any, steps: int = 5, **told: Any
) -> list[float]:
    losses = []
    for step in range(steps):
        batch = BATCHES[step % 4]
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        monitor.step(**({"loss": loss, "batch": batch} | told))
    return losses


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
        train(monitor, model, optimizer, 15)
        top = torch.linalg.eigvalsh(hessian_of(model))[-1].item()
    run = dyndiag.Run(tmp_path / "run")
    assert run["gradients/norm/0"].index.tolist() == list(range(23, 30))  # looked at step 22
    assert run["gradients/norm/2"].index.tolist() == list(range(30))
    assert run["curvature/sharpness"].iloc[-1] == pytest.approx(top, rel=1e-2)
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
            train(monitor, model, optimizer, 3)
            monitor.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert dyndiag.Run(tmp_path / "run").metadata["finished"] is None
    train(monitor, model, optimizer, 2)
    monitor.close()
    assert dyndiag.Run(tmp_path / "run")["train/loss"].index.tolist() == [0, 1, 2, 3]


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


# Bad input: at the door, before anything is touched.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "a model"}, r"model must be a torch.nn.Module, but it is a str"),
        ({"optimizer": None}, r"optimizer must be .* but it is missing"),
        ({"optimizer": 3}, r"optimizer must be .* but it is a int"),
        ({"loss_fn": 0.1}, r"loss_fn must be a function"),
        ({"model": nn.Sequential()}, r"has no parameters"),
        ({"optimizer": sgd(mlp())}, r"updates none of the model's parameters.*model.parameters"),
        ({"probe_batch": (torch.zeros(0, 8), torch.zeros(0))}, r"probe batch is empty"),
        ({"probe_batch": []}, r"probe batch is empty"),
        ({"probe_batch": DataLoader([1])}, r"one batch, but it is a DataLoader.*next\(iter"),
        ({"budget": 0}, r"budget is .* but it is 0"),
    ],
)
def test_refused_at_the_door(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    model = mlp()
    arguments = {"model": model, "optimizer": sgd(model), "loss_fn": cross_entropy} | change
    with pytest.raises(dyndiag.DyndiagError, match=says):
        dyndiag.Monitor(**arguments, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lazy_parameters_are_refused_in_words(tmp_path: Path) -> None:
    model = nn.LazyLinear(4)
    with pytest.raises(dyndiag.DyndiagError, match="run one batch through it"):
        dyndiag.Monitor(model, sgd(model), cross_entropy, run=tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    model = mlp()
    with pytest.raises(dyndiag.DyndiagError, match=r"run\.db"):
        dyndiag.Monitor(model, sgd(model), cross_entropy, run=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert not model._forward_hooks


# Bad input: during training, which goes on.


def bad(tmp_path: Path, loss_fn: Any, says: str, **options: Any) -> dyndiag.Run:
    model = mlp()
    optimizer = sgd(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(dyndiag.DyndiagWarning, match=says):  # noqa: SIM117
        with dyndiag.Monitor(model, optimizer, loss_fn, run=tmp_path / "run", **options) as monitor:
            train(monitor, model, optimizer)
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["train/loss"]) == 5
    return run


def test_a_loss_that_is_not_scalar(tmp_path: Path) -> None:
    def per_example(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    run = bad(tmp_path, per_example, r"one number.*shape \(6,\).*\.mean\(\)")
    assert "curvature/sharpness" not in run.names
    assert run.metadata["notices"][0]["step"] == 0


def test_a_loss_without_a_graph(tmp_path: Path) -> None:
    bad(tmp_path, lambda model, batch: cross_entropy(model, batch).detach(), r"no graph")


def test_a_loss_that_is_nan(tmp_path: Path) -> None:
    run = bad(tmp_path, lambda m, b: cross_entropy(m, b) * math.nan, r"finite|NaN|nan")
    assert (
        (run["curvature/sharpness.converged"] == 0).all()
        if ("curvature/sharpness" in run.names)
        else True
    )


def test_a_training_loss_that_is_nan_is_an_event(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dyndiag.DyndiagWarning)
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer, 3)
            with torch.no_grad():
                model[0].weight.fill_(math.nan)
            train(monitor, model, optimizer, 3)
    run = dyndiag.Run(tmp_path / "run")
    assert math.isnan(run["train/loss"][3])
    kinds = {event.kind for event in run.event_list()}
    assert "non_finite" in kinds


def test_a_step_loss_that_is_not_scalar(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with pytest.warns(dyndiag.DyndiagWarning, match=r"train/loss.*shape \(3,\)"):  # noqa: SIM117
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer, loss=torch.zeros(3))
    assert "train/loss" not in dyndiag.Run(tmp_path / "run").names


def test_no_loss_function_and_no_loss_in_the_output(tmp_path: Path) -> None:
    run = bad(tmp_path, None, r"no loss_fn was given")
    assert "curvature/sharpness" not in run.names
    assert len(run["gradients/norm"]) == 5
    assert "predictions/entropy" in run.names


def test_nothing_to_measure_on(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with pytest.warns(dyndiag.DyndiagWarning, match=r"no batch to measure on"):  # noqa: SIM117
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer, batch=None)
    assert len(dyndiag.Run(tmp_path / "run")["gradients/norm"]) == 5


def test_a_frozen_model(tmp_path: Path) -> None:
    model = mlp().requires_grad_(False)
    with pytest.warns(dyndiag.DyndiagWarning, match="no trainable parameter"):
        monitor = dyndiag.Monitor(model, sgd(model), cross_entropy, run=tmp_path / "run")
    for step in range(3):
        monitor.step(loss=float(step), batch=BATCHES[0])
    monitor.close()
    assert dyndiag.Run(tmp_path / "run")["train/loss"].tolist() == [0, 1, 2]


def test_an_unknown_optimizer_gets_no_threshold(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.01)
    with pytest.warns(dyndiag.DyndiagWarning, match=r"threshold of Rprop is not known"):  # noqa: SIM117
        with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer)
    run = dyndiag.Run(tmp_path / "run")
    assert "curvature/sharpness" in run.names
    assert "stability/threshold" not in run.names
    assert "stability/edge_ratio" not in run.names


def test_a_failure_is_told_once_and_is_an_event(tmp_path: Path) -> None:
    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("the disk with the tokenizer is gone")

    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with dyndiag.Monitor(model, optimizer, fails, run=tmp_path / "run") as monitor:
            train(monitor, model, optimizer, 30)
    by_name = [str(w.message) for w in told if "Sharpness failed" in str(w.message)]
    assert len([text for text in by_name if text.startswith("dyndiag: Sharpness")]) == 1
    assert "tokenizer is gone" in by_name[0]
    assert all(w.filename == __file__ for w in told)  # points at the user's own line
    kinds = [event.kind for event in dyndiag.Run(tmp_path / "run").event_list()]
    assert "probe_failed" in kinds


def test_warnings_as_errors_do_not_stop_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dyndiag.Monitor(model, sgd(model), run=tmp_path / "run") as monitor:
            monitor.step(loss=torch.zeros(2))
    assert "shape (2,)" in capsys.readouterr().err


def test_a_full_disk_stops_nothing_and_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    """In a process whose files may not grow beyond 300 kB; then they may again."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, warnings
        import torch, dyndiag
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        warnings.simplefilter("ignore")
        model = torch.nn.Linear(2, 2)
        monitor = dyndiag.Monitor(
            model, torch.optim.SGD(model.parameters(), lr=0.1), run=sys.argv[1], tensorboard=False
        )
        for step in range(2000):
            monitor.step(loss=float(step))
        assert monitor.flush()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        for step in range(2000, 30_000):
            monitor.step(loss=float(step))
        assert not monitor.flush()
        kept = len(dyndiag.Run(sys.argv[1])["train/loss"])
        assert 2000 <= kept < 30_000, kept
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert monitor.flush()
        monitor.close()
        values = dyndiag.Run(sys.argv[1])["train/loss"]
        assert values.tolist() == [float(step) for step in range(30_000)]
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
