"""Bad input: one clear sentence, and the training goes on wherever it can."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dyndiag
from tests.loops import BATCHES, sgd, train
from tests.models import cross_entropy, mlp

# Bad input: at the door, before anything is touched.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "a model"}, r"model must be a torch.nn.Module, but it is a str"),
        ({"optimizer": None}, r"optimizer must be .* but it is missing"),
        ({"optimizer": 3}, r"optimizer must be .* but it is a int"),
        ({"loss_fn": 0.1}, r"loss_fn must be a function"),
        ({"loss_fn": lambda output: output.sum()}, r"loss_fn\(model, batch\), but .* \(output\)"),
        ({"loss_fn": nn.CrossEntropyLoss().forward.__func__}, r"but it takes \(self, input"),
        ({"run": None}, r"run must be the path .* but it is None"),
        ({"model": nn.Sequential()}, r"has no parameters"),
        ({"optimizer": sgd(mlp())}, r"updates none of the model's parameters.*model.parameters"),
        ({"probe_batch": (torch.zeros(0, 8), torch.zeros(0))}, r"probe batch is empty"),
        ({"probe_batch": []}, r"probe batch is empty"),
        ({"probe_batch": DataLoader([1])}, r"one batch, but it is a DataLoader.*next\(iter"),
        ({"budget": 0}, r"budget is .* but it is 0"),
        ({"budget": "5%"}, r"budget is .* but it is '5%'"),
    ],
)
def test_refused_at_the_door(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    model = mlp()
    arguments = {"model": model, "optimizer": sgd(model), "loss_fn": cross_entropy}
    arguments |= {"run": tmp_path / "run"} | change
    with pytest.raises(dyndiag.DyndiagError, match=says):
        dyndiag.Monitor(**arguments)
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
    assert all(Path(w.filename).name == "loops.py" for w in told)  # points at the user's own line
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
