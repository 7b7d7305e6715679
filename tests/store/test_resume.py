"""The same folder again: the run goes on, or from a step on begins anew."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from dyndiag.store import Run, Writer
from dyndiag.values import Event


def record(folder: Path, steps: range, **how: int) -> int:
    """Write a run of these steps, with an array and an event at every tenth; its first step."""
    with closing(Writer(folder, **how)) as writer:
        for step in steps:
            row = {"train/loss": float(step), "gradients/norm/a": 1.0}
            tenth = step % 10 == 0
            writer.write(
                [(step, {**row, "curvature/density": np.full(3, step)} if tenth else row)],
                [Event("loss_spike", step, step, step + 5)] if tenth else [],
            )
        return writer.next_step


def test_a_run_begins_at_zero_and_goes_on_after_its_last_row(tmp_path: Path) -> None:
    assert record(tmp_path, range(25)) == 0
    assert record(tmp_path, range(25, 27)) == 25
    assert list(Run(tmp_path)["train/loss"]) == list(range(27))


def test_the_last_row_counts_whichever_stream_has_it(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0}), (8, {"curvature/density": np.zeros(3)})])
    with closing(Writer(tmp_path)) as writer:
        assert writer.next_step == 9


def test_from_the_first_step_on_everything_is_replaced(tmp_path: Path) -> None:
    record(tmp_path, range(40))
    with closing(Writer(tmp_path, first_step=20)) as writer:
        assert writer.next_step == 20
        run = Run(tmp_path)
        assert run.last_step == 19
        assert all(run[name].index.max() == 19 for name in run.names)
        assert list(run.arrays("curvature/density")) == [0, 10]
        assert [event.start for event in run.event_list()] == [0, 10]
    assert record(tmp_path, range(20, 22)) == 20
    assert list(Run(tmp_path)["train/loss"]) == list(range(22))


def test_a_first_step_beyond_the_last_row_leaves_a_gap(tmp_path: Path) -> None:
    record(tmp_path, range(5))
    assert record(tmp_path, range(100, 102), first_step=100) == 100
    assert list(Run(tmp_path)["train/loss"].index) == [0, 1, 2, 3, 4, 100, 101]


def test_first_step_zero_begins_anew_and_keeps_the_metadata(tmp_path: Path) -> None:
    record(tmp_path, range(5))
    with closing(Writer(tmp_path)) as writer:
        writer.write_metadata({"seed": 1})
    with closing(Writer(tmp_path, first_step=0)) as writer:
        assert writer.next_step == 0
    run = Run(tmp_path)
    assert (list(run.rows()), run.event_list(), run.array_names) == ([], [], [])
    assert (run.last_step, run.metadata) == (None, {"seed": 1})


def test_restarts_are_kept_as_long_as_their_rows_are(tmp_path: Path) -> None:
    record(tmp_path, range(5))
    assert "restarts" not in Run(tmp_path).metadata
    record(tmp_path, range(5, 30))
    record(tmp_path, range(30, 40))
    assert Run(tmp_path).metadata["restarts"] == [5, 30]
    record(tmp_path, range(10, 12), first_step=10)
    assert Run(tmp_path).metadata["restarts"] == [5, 10]
    record(tmp_path, range(3), first_step=0)
    assert "restarts" not in Run(tmp_path).metadata
