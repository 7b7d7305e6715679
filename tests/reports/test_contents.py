from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyndiag.detectors import replay
from dyndiag.reports import contents, verdict
from dyndiag.reports.contents import Contents, Estimates
from dyndiag.store import Run
from tests.reports import made


def read(folder: Path) -> Contents:
    return contents(Run(folder))


def test_numbers_are_the_runs(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "run", made.edge())
    c, run = read(folder), Run(folder)
    assert c.name == "run" and (c.first, c.last, c.rows) == (0, 1999, 2000)
    assert c.loss is not None
    assert np.array_equal(c.loss.values, run["train/loss"].to_numpy())
    sharp = c.get("curvature/sharpness")
    assert isinstance(sharp, Estimates)
    assert np.array_equal(sharp.values, run["curvature/sharpness"].to_numpy())
    assert sharp.products == 8 * len(sharp)


def test_statuses_and_intervals(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.edge()))
    one = c.estimates["curvature/sharpness"]
    assert one.status.startswith("ppp") and one.status.endswith("o")
    assert one.status.count("p") == sum(step < 300 for step in one.steps)
    i = one.status.index("c")
    assert one.lower[i] == one.values[i]  # certified intervals open upwards
    assert one.upper[i] == pytest.approx(1.02 * one.values[i])
    assert one.lower[0] == pytest.approx(0.98 * one.values[0])  # provisional: the residual


def test_trace_has_students_interval(tmp_path: Path) -> None:
    trace = read(made.write(tmp_path / "run", made.edge())).estimates["curvature/trace"]
    assert trace.upper[0] - trace.values[0] == pytest.approx(2.262 * 1.5)  # ten probes
    assert trace.values[0] - trace.lower[0] == pytest.approx(2.262 * 1.5)


def test_replay_agrees(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.edge()))
    assert c.replay == "agrees" and not c.disagreements
    assert {event.kind for event in c.events} >= {"edge_of_stability", "progressive_sharpening"}


def test_replay_that_disagrees_is_told_and_wins(tmp_path: Path) -> None:
    rows = made.spiked()
    honest = replay(rows)
    c = read(made.write(tmp_path / "run", rows, events=[]))
    assert c.replay == "disagrees" and c.disagreements == ("loss_spike from step 400",)
    assert list(c.events) == honest


def test_replay_uses_the_runs_settings(tmp_path: Path) -> None:
    settings = made.settings()
    settings["loss_spike"]["rise"] = 10.0
    c = read(made.write(tmp_path / "run", made.spiked(), {"detectors": settings}, events=[]))
    assert c.replay == "agrees" and c.events == ()


def test_without_settings_the_stored_events_count(tmp_path: Path) -> None:
    rows = made.spiked()
    assert read(made.write(tmp_path / "a", rows, {"detectors": None})).events
    c = read(made.write(tmp_path / "b", rows, {"detectors": None}, events=[]))
    assert [event.kind for event in c.events] == ["loss_spike"]  # found now


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "empty"),
        ([(0, {"train/loss": 1.5})], "Nothing to report: no event in one step."),
        ([(i, {"train/loss": float("nan")}) for i in range(40)], "NaN from the first step on"),
    ],
)
def test_runs_with_next_to_nothing(tmp_path: Path, rows: made.Rows, said: str) -> None:
    assert said in verdict(read(made.write(tmp_path / "run", rows)))


def test_modules_come_in_forward_order(tmp_path: Path) -> None:
    model = {"class": "Net", "modules": ["out", "hidden"]}
    c = read(made.write(tmp_path / "run", made.edge(100), {"model": model}))
    assert c.parts["gradients/norm/"] == ("out", "hidden")


def test_a_run_without_end(tmp_path: Path) -> None:
    c = read(made.write(tmp_path / "run", made.spiked(50), {"finished": None}))
    assert c.alive and c.ended == ""
