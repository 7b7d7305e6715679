"""The command line as scripts and people use it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dyndiag
from dyndiag.cli import main


@pytest.fixture
def spiked(tmp_path: Path) -> Path:
    """A run whose loss spikes, comes back, and becomes NaN at its end."""
    model = torch.nn.Linear(2, 2)
    losses = [1 + 0.01 * (-1) ** k for k in range(60)] + [3.0] * 3 + [1.0] * 40 + [math.nan] * 3
    folder = tmp_path / "spiked"
    with dyndiag.Monitor(model, torch.optim.SGD(model.parameters(), 0.1), run=folder) as monitor:
        for loss in losses:
            monitor.step(loss=loss)
    return folder


pytestmark = pytest.mark.filterwarnings("ignore::dyndiag.DyndiagWarning")


def test_events_as_lines_and_as_json(spiked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", str(spiked)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss_spike")
    assert "step        60" in lines[0]
    assert main(["events", str(spiked), "--json"]) == 0
    events = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    by_kind = {event["kind"]: event for event in events}
    assert by_kind["loss_spike"]["start"] == 60
    assert by_kind["non_finite"]["end"] is None


def test_check_is_for_scripts(spiked: Path, tmp_path: Path) -> None:
    assert main(["events", str(spiked), "--check"]) == 1
    model = torch.nn.Linear(2, 2)
    calm = tmp_path / "calm"
    with dyndiag.Monitor(model, torch.optim.SGD(model.parameters(), 0.1), run=calm) as monitor:
        monitor.step(loss=1.0)
    assert main(["events", str(calm), "--check"]) == 0


def test_report_prints_the_verdict_and_the_page(
    spiked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(spiked)]) == 0
    verdict, page = capsys.readouterr().out.strip().splitlines()
    assert "NaN" in verdict
    assert page.endswith("report.html")
    assert (spiked / "report.html").read_text().startswith("<!doctype html>")


def test_output_is_for_one_run(
    spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(spiked), "--output", str(page)]) == 0
    assert page.exists()
    assert main(["report", str(spiked), str(spiked), "--output", str(page)]) == 2
    assert "--output takes one run" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_one_sentence(
    spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, said in ((tmp_path, "is a folder: give a file"), (tmp_path / "file" / "x", "give")):
        assert main(["report", str(spiked), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dyndiag: the report") and said in error
    assert not list(tmp_path.parent.glob(".*.part"))


def test_a_run_that_cannot_be_read_leaves_the_others(
    spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nothing"), str(spiked)]) == 2
    shown = capsys.readouterr()
    assert "is not a run" in shown.err and "report.html" in shown.out


def test_what_is_no_run_is_one_sentence(
    spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("report", "events"):
        assert main([command, str(tmp_path / "nothing")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dyndiag: ")
        assert error.count("\n") == 1
        assert "spiked" in error  # the run beside it


def test_demo_does_not_remove_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "thesis.tex").write_text("years of work")
    assert main(["demo", "gap", "--runs", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err
    assert (tmp_path / "gap" / "thesis.tex").exists()


@pytest.mark.parametrize("command", [[], ["demo"], ["report"], ["events"]])
def test_help_as_a_module(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dyndiag", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: dyndiag" in done.stdout
    assert len(done.stdout) > 300
