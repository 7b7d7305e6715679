from __future__ import annotations

import math
from pathlib import Path

import pytest

from dyndiag.reports import contents, report
from dyndiag.reports.chapters import chapters
from dyndiag.reports.chapters.items import Metrics, Table
from dyndiag.reports.continual import measured
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
    found = measured(
        contents(run(tmp_path, [0.1, 0.5, 0.9, 0.5, 0.7, 0.85], [0.1, 0.1, 0.1, 0.4, 0.6, 0.8], 3))
    )
    assert found.acc == pytest.approx(0.825)
    assert found.forg == pytest.approx(0.05)
    assert found.min_acc == pytest.approx(0.5)
    assert found.wc_acc == pytest.approx(0.65)
    assert (found.wf[10], found.wp[10]) == pytest.approx((0.2, 0.75))


def test_what_the_chapter_shows(tmp_path: Path) -> None:
    c = contents(Run(made.write(tmp_path / "run", made.switch())))
    (chapter,) = [chapter for chapter in chapters(c) if chapter.id == "continual"]
    (shown,) = [item for item in chapter.items if isinstance(item, Metrics)]
    assert [(value, name) for value, name, _ in shown.values] == [
        ("95.5 %", "ACC"), ("2.0", "forgetting"), ("70.0 %", "min-ACC"), ("82.5 %", "WC-ACC"),
        ("12.6", "WF¹⁰"), ("9.0", "WP¹⁰"), ("28.0", "deepest dip"),
    ]  # fmt: skip
    (table,) = [item for item in chapter.items if isinstance(item, Table)]
    assert table.rows[0] == (
        "A", "0 to 199", "98.0 %", "70.0 % at 210", "36 steps", "96.0 %", "28.0", "2.0",
    )  # fmt: skip
    assert table.rows[1][3:5] == ("–", "–")


def test_one_task_has_no_forgetting(tmp_path: Path) -> None:
    rows = [(i, {"continual/task": 0.0, "continual/accuracy/A": 0.7}) for i in range(5)]
    found = measured(contents(Run(made.write(tmp_path / "run", rows, {"tasks": ["A"]}))))
    assert found.wc_acc == pytest.approx(0.7) and math.isnan(found.forg)


def test_depth_of_the_dip(tmp_path: Path) -> None:
    c = contents(Run(made.write(tmp_path / "run", made.switch())))
    first, second = measured(c).tasks
    assert (first.name, first.end, first.lowest_step) == ("A", 199, 210)
    assert first.depth == pytest.approx(0.28) and first.forgetting == pytest.approx(0.02)
    assert math.isnan(second.lowest)


def test_wilson_interval() -> None:
    import numpy as np

    lower, upper = wilson(np.array([0.066, 0.0, 1.0]), np.array([500.0, 10.0, 10.0]))
    assert lower[0] == pytest.approx(0.0473782, abs=1e-6)  # by an independent implementation
    assert upper[0] == pytest.approx(0.0912399, abs=1e-6)
    assert lower[1] == pytest.approx(0, abs=1e-12) and upper[2] == pytest.approx(1, abs=1e-12)


def test_long_pauses_between_evaluations_are_told(tmp_path: Path) -> None:
    rows = [
        (step, values if step < 60 or 200 <= step < 240 else {"train/loss": 1.0})
        for step, values in made.switch()
    ]
    html = report(made.write(tmp_path / "run", rows, {"tasks": ["A", "B"]})).read_text("utf-8")
    assert "lie 1 step apart in the median and 141 at most; what happened between" in html
    assert "The last was at step 239 of 399." in html
