"""What a user asks for besides the default set: further probes, and series of one's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dyndiag
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from tests.models import batches, cross_entropy, mlp


class LargestWeight:
    """A probe that takes samples of its own."""

    name = "LargestWeight"
    due = Every(3)

    def applies(self, state: TrainState) -> bool:
        return True

    def measure(self, state: TrainState) -> dict[str, Any]:
        return {"mine/largest_weight": max(p.abs().max() for p in state.parameters)}


class OneStep:
    """A probe that reads steps as they pass."""

    name = "OneStep"

    def __init__(self) -> None:
        self.due = Every(2)
        self.notices: list[str] = []

    def before(self, step: Any) -> dict[str, Any]:
        self._weight = step.parameters[0].clone()
        return {"mine/gradient": step.gradient_norms[0], "mine/first": step.gradients[0].norm()}

    def after(self, step: Any) -> dict[str, Any]:
        self.notices.append("a word from OneStep")
        return {"mine/moved": (step.parameters[0] - self._weight).norm()}


class Fails(OneStep):
    name = "Fails"

    def after(self, step: Any) -> dict[str, Any]:
        raise RuntimeError("no such thing")


def train(
    run: Path, steps: int = 7, record: Any = None, closure: bool = False, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    model, batch = mlp(), batches("mlp", 1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=run, tensorboard=False, **options
    ) as monitor:
        for step in range(steps):

            def gradients() -> torch.Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                return loss

            if closure:
                loss = optimizer.step(gradients)
            else:
                loss = gradients()
                optimizer.step()
            if record is not None:
                monitor.record(record(step))
            monitor.step(loss=loss, batch=batch)
    return model


def test_probes_that_are_asked_for_are_asked_when_they_are_due(tmp_path: Path) -> None:
    with pytest.warns(dyndiag.DyndiagWarning, match="a word from OneStep"):
        watched = train(tmp_path / "a", probes=[LargestWeight(), OneStep()])
    run = dyndiag.Run(tmp_path / "a")
    assert list(run["mine/largest_weight"].index) == [0, 3, 6]
    assert list(run["mine/moved"].index) == [0, 2, 4, 6]
    np.testing.assert_allclose(run["mine/gradient"], run["mine/first"], rtol=1e-6)
    np.testing.assert_allclose(run["mine/moved"], 0.1 * run["mine/gradient"], rtol=1e-4)
    cost = run.metadata["cost"]
    assert cost["OneStep"]["samples"] == 4 and cost["OneStep"]["seconds"] > 0
    assert cost["LargestWeight"]["samples"] == 3
    plain = train(tmp_path / "b")
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_closure_computes_its_gradients_too_late_to_be_read_before(tmp_path: Path) -> None:
    probe = OneStep()
    probe._weight = torch.zeros(())
    with pytest.warns(dyndiag.DyndiagWarning, match="a word"):
        train(tmp_path / "run", closure=True, probes=[probe])
    run = dyndiag.Run(tmp_path / "run")
    assert "mine/moved" in run.names and "mine/gradient" not in run.names


def test_a_probe_that_fails_is_told_and_missing(tmp_path: Path) -> None:
    with pytest.warns(dyndiag.DyndiagWarning, match="Fails failed at step 0: no such thing"):
        train(tmp_path / "run", probes=[Fails()])
    run = dyndiag.Run(tmp_path / "run")
    assert "mine/moved" not in run.names and list(run["failures/Fails"].index) == [0, 2, 4, 6]
    assert len(run["mine/gradient"]) == 4 and len(run["train/loss"]) == 7


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ([LargestWeight], r"pass LargestWeight\(\)"),
        (LargestWeight(), r"must be a list of probes, but it is a LargestWeight"),
        (["sharpness"], "but it holds 'sharpness'"),
        ([OneStep(), OneStep()], "two probes named OneStep"),
        ([type("Sharpness", (LargestWeight,), {"name": "Sharpness"})()], "named Sharpness"),
    ],
)
def test_what_is_no_probe_is_refused(probes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(dyndiag.DyndiagError, match=said):
        train(tmp_path / "run", probes=probes)
    assert not (tmp_path / "run").exists()


def test_own_values_are_kept_with_the_step_under_way(tmp_path: Path) -> None:
    def record(step: int) -> dict[str, Any]:
        estimate = dyndiag.Estimate(1.5, error=0.1)
        if step == 3:
            return {"policy/entropy": math.nan, "policy/kl": estimate}
        return {"policy/entropy": torch.tensor(float(step)), "mine/spectrum": np.arange(3.0)}

    train(tmp_path / "run", record=record)
    run = dyndiag.Run(tmp_path / "run")
    expected = [0, 1, 2, math.nan, 4, 5, 6]
    np.testing.assert_array_equal(run["policy/entropy"], expected)
    assert list(run["policy/kl"].index) == [3] and run["policy/kl.error"].iloc[0] == 0.1
    assert list(run.arrays("mine/spectrum")) == [0, 1, 2, 4, 5, 6]


def test_own_values_recorded_after_the_last_step_are_not_lost(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dyndiag.Monitor(model, optimizer, run=tmp_path / "run", tensorboard=False) as monitor:
        optimizer.step()
        monitor.step(loss=1.0)
        monitor.record({"mine/last": 3})
    assert dyndiag.Run(tmp_path / "run")["mine/last"].to_dict() == {0: 3.0}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3.0, "but got a float"),
        ({"loss": 1.0}, "area/quantity"),
        ({"mine//x": 1.0}, "area/quantity"),
        ({3: 1.0}, "but got 3"),
        ({"mine/x": "high"}, "mine/x must be a number, a tensor or an Estimate, but it is a str"),
        ({"mine/x": True}, "but it is a bool"),
        ({"mine/x": None}, "but it is a NoneType"),
    ],
)
def test_what_cannot_be_kept_is_refused(values: Any, said: str, tmp_path: Path) -> None:
    with (
        dyndiag.Monitor(
            model := mlp(), torch.optim.SGD(model.parameters(), 0.1), run=tmp_path / "run"
        ) as monitor,
        pytest.raises(dyndiag.DyndiagError, match=said),
    ):
        monitor.record(values)


def accuracies(run: Path, steps: int, tasks: dict[int, str], loss_fn: Any = cross_entropy) -> Any:
    """Steps of a training, on from where the run ends, with tasks that begin at some of them."""
    model, data = mlp(), batches("mlp", 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dyndiag.Monitor(model, optimizer, loss_fn, run=run, tensorboard=False) as monitor:
        for step in range(steps):
            if step in tasks:
                monitor.start_task(tasks[step], data[:2])
            loss = cross_entropy(model, data[0])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=data[0])
    return dyndiag.Run(run)


def test_a_run_that_goes_on_keeps_its_tasks(tmp_path: Path) -> None:
    accuracies(tmp_path / "run", 20, {0: "A", 10: "B"})
    run = accuracies(tmp_path / "run", 20, {0: "B", 10: "C"})
    assert run.metadata["task_starts"] == {"A": 0, "B": 10, "C": 30}
    index = run["continual/task"]
    for low, high, task in ((0, 9, 0), (10, 29, 1), (30, 39, 2)):
        assert set(index.loc[low:high]) == {task}
    assert run["continual/accuracy/A"].index.max() <= 19  # nobody said what it is judged on
    seen = run["continual/accuracy/B"].index
    assert seen.min() == 9 and 29 in seen  # the evaluations just before each switch
    assert run["continual/accuracy/C"].index.min() == 29


def test_a_switch_without_a_loss_function_is_evaluated_too(tmp_path: Path) -> None:
    run = accuracies(tmp_path / "run", 20, {0: "A", 10: "B"}, loss_fn=None)
    assert not [name for name in run.names if name.startswith("failures/")]
    assert 9 in run["continual/accuracy/A"].index and 9 in run["continual/accuracy/B"].index
