from __future__ import annotations

import math
from pathlib import Path

import pytest

from dyndiag.reports import contents
from dyndiag.reports.continual import results, summary
from dyndiag.reports.figures import wilson
from dyndiag.store import Run
from tests.reports import made


def run(tmp_path: Path, first: list[float], second: list[float], switch: int) -> Run:
    rows = [
        (
            i,
            {
                "train/loss": 1.0,
                "continual/task": float(i >= switch),
                "continual/accuracy/one": a,
                "continual/accuracy/two": b,
            },
        )
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return Run(made.write(tmp_path / "run", rows, {"tasks": ["one", "two"]}))


def test_known_series(tmp_path: Path) -> None:
    # De Lange et al.'s definitions on a series whose numbers are known by hand.
    found = summary(
        contents(run(tmp_path, [0.1, 0.5, 0.9, 0.5, 0.7, 0.85], [0.1, 0.1, 0.1, 0.4, 0.6, 0.8], 3))
    )
    assert found is not None
    assert found.accuracy == pytest.approx(0.825)
    assert found.forgetting == pytest.approx(0.05)
    assert found.lowest == pytest.approx(0.5)
    assert found.worst_case == pytest.approx(0.65)


def test_one_task_has_no_forgetting(tmp_path: Path) -> None:
    rows = [(i, {"continual/task": 0.0, "continual/accuracy/A": 0.7}) for i in range(5)]
    found = summary(contents(Run(made.write(tmp_path / "run", rows, {"tasks": ["A"]}))))
    assert found is not None
    assert found.worst_case == pytest.approx(0.7) and math.isnan(found.forgetting)


def test_depth_of_the_dip(tmp_path: Path) -> None:
    c = contents(Run(made.write(tmp_path / "run", made.switch())))
    first, second = results(c)
    assert (first.name, first.end, first.lowest_step) == ("A", 199, 210)
    assert first.depth == pytest.approx(0.28) and first.forgetting == pytest.approx(0.02)
    assert math.isnan(second.lowest)


def test_wilson_interval() -> None:
    import numpy as np

    lower, upper = wilson(np.array([0.066, 0.0, 1.0]), np.array([500.0, 10.0, 10.0]))
    assert lower[0] == pytest.approx(0.0473782, abs=1e-6)  # by an independent implementation
    assert upper[0] == pytest.approx(0.0912399, abs=1e-6)
    assert lower[1] == pytest.approx(0, abs=1e-12) and upper[2] == pytest.approx(1, abs=1e-12)
