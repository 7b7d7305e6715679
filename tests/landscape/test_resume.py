"""What was interrupted goes on where it stopped, to the same numbers bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag import landscape
from dyndiag.errors import DyndiagError
from dyndiag.landscape import saved
from tests.landscape.made import NOTHING, Weights, cross_entropy, double_well, network, task

DATA = task(50)
Run = Callable[[Any, Path | None], np.ndarray[Any, Any]]


class Counted:
    """A loss function that counts its calls, and may take its time, end, or come to no end."""

    def __init__(
        self, seconds: float = 0.0, last: int | None = None, stuck_after: int = 1_000_000
    ) -> None:
        self.calls, self.seconds, self.last, self.stuck_after = 0, seconds, last, stuck_after

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        time.sleep(60.0 if self.calls > self.stuck_after else self.seconds)
        return cross_entropy(model, batch)


def line(loss_fn: Any, resume: Path | None) -> Any:
    loader = DataLoader(TensorDataset(*DATA), batch_size=32, shuffle=True)
    return landscape.line(network(0), loss_fn, loader, points=15, resume=resume).losses


def plane(loss_fn: Any, resume: Path | None) -> Any:
    return landscape.plane(network(0), loss_fn, DATA, points=5, resume=resume).losses


def path(loss_fn: Any, resume: Path | None) -> Any:
    ends = network(0), network(1)
    found = landscape.interpolate(network(2), *ends, loss_fn, DATA, points=15, resume=resume)
    assert found.accuracies is not None
    return np.stack([found.losses, found.accuracies])


RUNS: list[Run] = [line, plane, path]


def done(file: Path) -> int:
    if not file.exists():
        return 0
    with np.load(file) as kept:
        return int(kept["done"].sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm parent to be quick")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "_SECONDS", 0.05)
    file = tmp_path / "deep" / "kept.npz"
    whole = Counted()
    expected = run(whole, None)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            torch.rand(5)  # another state of the global stream
            run(Counted(seconds=0.06, stuck_after=12), file)
        finally:
            os._exit(1)
    end = time.monotonic() + 50
    while done(file) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL  # it was still measuring
    kept = done(file)
    rest = Counted()
    found = run(rest, file)
    passes = whole.calls // (expected.size if run is not path else expected.shape[1])
    assert 3 <= kept < whole.calls // passes
    # What was left, and the first point once more: that the loss function is the same.
    assert rest.calls == whole.calls - (kept - 1) * passes
    assert found.tobytes() == expected.tobytes()
    again = Counted()
    assert run(again, file).tobytes() == expected.tobytes()
    assert again.calls == passes
    assert os.listdir(file.parent) == ["kept.npz"]


@pytest.mark.parametrize("run", RUNS)
def test_ctrl_c_keeps_every_finished_point(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "kept.npz"
    with pytest.raises(KeyboardInterrupt):
        run(Counted(last=11), file)
    kept = done(file)
    assert kept == (5 if run is line else 10)  # two batches a point
    assert run(Counted(), file).tobytes() == run(Counted(), None).tobytes()


def test_it_is_written_once_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, clock = [], [0.0]
    write = np.savez

    def written(*args: Any, **arrays: Any) -> None:
        writes.append(clock[0])
        write(*args, **arrays)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(np, "savez", written)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        clock[0] += 0.3
        return double_well(model, batch)

    landscape.line(
        Weights(1.0), loss_fn, NOTHING, along=torch.ones(1), points=10, resume=tmp_path / "l.npz"
    )
    assert writes == pytest.approx([0.0, 1.2, 2.4, 3.0])  # the first is empty, the last ends it


def test_nan_is_a_finished_point(tmp_path: Path) -> None:
    calls = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        return model.t.log().sum()

    for expected in (5, 6):  # the second time the first point alone, which is NaN again
        found = landscape.line(
            Weights(1.0), loss_fn, NOTHING, along=torch.ones(1), between=(-2.0, 2.0), points=5,
            resume=tmp_path / "l.npz",
        )  # fmt: skip
        assert len(calls) == expected
        assert np.isnan(found.losses[0]) and found.losses[1] == -np.inf


def other_buffer() -> nn.Module:
    model = network(0)
    model.register_buffer("table", torch.ones(2))
    return model


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": network(1)}, "another model"),
        ({"model": other_buffer()}, "another model"),
        ({"data": (DATA[0] + 1e-6, DATA[1])}, "other data"),
        ({"data": (DATA[0], DATA[1].roll(1))}, "other data"),
        ({"data": DataLoader(TensorDataset(*DATA), batch_size=20)}, "other data"),
        ({"along": torch.ones(1540)}, "another direction"),
        ({"along": torch.ones(32), "parameters": "0.bias"}, "another direction"),
        ({"points": 7}, "another grid"),
        ({"between": (-1.0, 1.1)}, "another grid"),
        ({"eval_mode": False}, "another mode"),
        ({"loss_fn": lambda m, b: 2 * cross_entropy(m, b)}, "another loss function"),
        ({"model": other_buffer(), "points": 7}, "another model and another grid"),
    ],
)
def test_the_file_of_something_else_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "kept.npz"
    ask: dict[str, Any] = {
        "model": network(0), "loss_fn": cross_entropy, "data": DATA, "points": 5, "resume": file,
    }  # fmt: skip
    landscape.line(**ask)
    before = file.read_bytes()
    with pytest.raises(DyndiagError, match=rf"kept\.npz is of {says}.*pass another path"):
        landscape.line(**ask | change)
    assert file.read_bytes() == before
    landscape.line(**ask)


def test_the_same_vector_over_other_parameters_is_another_direction(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4))
    ask: dict[str, Any] = {
        "along": torch.ones(4), "parameters": "0.bias", "points": 3, "resume": tmp_path / "l.npz",
    }  # fmt: skip
    landscape.line(model, cross_entropy, DATA, **ask)
    with pytest.raises(DyndiagError, match="of another direction"):
        landscape.line(model, cross_entropy, DATA, **ask | {"parameters": "1.bias"})


def test_the_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kept.npz"
    plane(cross_entropy, file)
    with pytest.raises(DyndiagError, match=r"is of another kind of landscape \(plane 1\)"):
        path(cross_entropy, file)
    file.unlink()
    path(cross_entropy, file)
    ends = network(0), network(1)
    with pytest.raises(DyndiagError, match="of another pair of checkpoints"):
        landscape.interpolate(*ends, ends[0], cross_entropy, DATA, points=15, resume=file)
    with pytest.raises(DyndiagError, match="of another setting of recompute_batchnorm"):
        landscape.interpolate(
            network(2), *ends, cross_entropy, DATA, points=15, resume=file, recompute_batchnorm=True
        )


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 half a file"])
def test_what_is_no_landscape_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.npz"
    file.write_bytes(content)
    with pytest.raises(DyndiagError, match="not a file that a landscape was kept in"):
        line(cross_entropy, file)
    assert file.read_bytes() == content
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", done=np.ones(3))
    for other in (tmp_path / "array.npy", tmp_path / "other.npz", tmp_path):
        with pytest.raises(DyndiagError, match="not a file that a landscape was kept in"):
            line(cross_entropy, other)


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counted = Counted()
    with pytest.raises(DyndiagError, match="cannot be written"):
        plane(counted, tmp_path / "file" / "kept.npz")
    assert counted.calls == 0
