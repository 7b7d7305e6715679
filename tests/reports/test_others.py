"""Series that no chapter is made for: drawn all the same, or told in a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dyndiag.reports.chapters.items import Absent, Chart, Table, Text
from dyndiag.reports.chapters.others import MOST_CHARTS, others
from dyndiag.reports.contents import contents
from dyndiag.reports.page import page as page_of
from dyndiag.store import Run
from tests.reports.made import write


def rows(**more: Any) -> list[tuple[int, dict[str, Any]]]:
    out = []
    for step in range(40):
        values: dict[str, Any] = {"train/loss": 2 - step / 40, "mine/reward": math.sin(step)}
        for block in range(3):
            values[f"activations/rms/blocks.{block}"] = 10.0 ** (block + step / 40)
            values[f"gradients/nlm_cosine/blocks.{block}"] = math.cos(step / 9 + block)
        out.append((step, values | more))
    out[-1][1]["weights/once"] = 3.25
    return out


def test_a_users_own_series_and_those_of_modules_are_drawn(tmp_path: Path) -> None:
    c = contents(Run(write(tmp_path / "run", rows())))
    chapter = others(c)
    drawn = {item.figure.title: item.figure for item in chapter.items if isinstance(item, Chart)}
    assert set(drawn) == {"RMS of activations", "Gradient along the weights", "Mine: reward"}
    assert drawn["RMS of activations"].marks[0].type == "rows"  # spreads over decades
    along = drawn["Gradient along the weights"]
    assert [mark.label for mark in along.marks] == ["largest", "smallest"]
    low = along.data[1].series
    assert low.at(18) == min(math.cos(2 + block) for block in range(3))
    (table,) = [item for item in chapter.items if isinstance(item, Table)]
    assert table.rows == (("weights/once", "1", "3.25", "3.25", "3.25", "3.25"),)


def test_what_there_is_no_room_for_is_told(tmp_path: Path) -> None:
    many = {f"mine/quantity{i}": float(i) for i in range(60)}
    chapter = others(contents(Run(write(tmp_path / "run", rows(**many)))))
    assert sum(isinstance(item, Chart) for item in chapter.items) == MOST_CHARTS
    (table,) = [item for item in chapter.items if isinstance(item, Table)]
    assert len(table.rows) >= 60 + 4 - MOST_CHARTS


def test_a_run_without_them_says_how_to_get_some(tmp_path: Path) -> None:
    plain = [(step, {"train/loss": 1.0, "failures/Trace": 1.0}) for step in range(5)]
    (item,) = others(contents(Run(write(tmp_path / "run", plain)))).items
    assert isinstance(item, Absent) and "probes=" in item.line


def test_the_page_with_them_is_made(tmp_path: Path) -> None:
    hostile = {"mine/<script>alert(1)</script>": 1.0}
    page = page_of(contents(Run(write(tmp_path / "run", rows(**hostile)))))
    assert "Mine: reward" in page and "<script>alert(1)" not in page


def test_shares_are_drawn_to_scale_and_what_grows_by_decades_is_not(tmp_path: Path) -> None:
    both = [
        (step, {"mine/share": (step + 1) / 41, "mine/size": 10.0 ** (step / 10)})
        for step in range(40)
    ]
    items = others(contents(Run(write(tmp_path / "run", both)))).items
    drawn = {item.figure.title: item.figure.y for item in items if isinstance(item, Chart)}
    assert drawn == {"Mine: share": {}, "Mine: size": {"type": "log"}}


def test_a_thousand_quantities_come_in_order_and_the_cut_is_told(tmp_path: Path) -> None:
    rows = [(step, {f"eval/task{i}": float(step) for i in range(1000)}) for step in range(3)]
    chapter = others(contents(Run(write(tmp_path / "run", rows))))
    titles = [item.figure.title for item in chapter.items if isinstance(item, Chart)]
    assert titles[:3] == ["Eval: task0", "Eval: task1", "Eval: task2"] and len(titles) == 40
    (said,) = (item.text for item in chapter.items if isinstance(item, Text))
    assert said.endswith("what there was no room to draw (the first 200 of 960):")
    (table,) = (item for item in chapter.items if isinstance(item, Table))
    assert len(table.rows) == 200 and table.rows[0][0] == "eval/task40"
