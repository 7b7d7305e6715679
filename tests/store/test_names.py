"""Any series has its place, and in the ordinary case SQL finds it under its own name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndiag.errors import DyndiagError
from dyndiag.store import Run, Writer
from dyndiag.store.places import place

HOSTILE = [
    "gradients/norm/A",
    "gradients/norm/a",
    "gradients/norm/a__2",
    "gradients/step",
    "gradients/STEP",
    "gradients/rowid",
    "gradients/_rowid_",
    "gradients__2/norm",
    "Gradients/norm",
    "events/start",
    "Series/name",
    "arrays/data",
    "metadata/key",
    "excluded/norm",
    "sqlite_master/name",
    "sqlite_sequence/sqlite_x",
    "pragma_table_info/name",
    "json_each/value",
    "main/main.main",
    "continual/accuracy/x'); DROP TABLE series; --",
    'continual/accuracy/"; DROP TABLE series; --',
    'continual/accuracy/"quoted" `and` [so] on',
    "continual/accuracy/blocks.3.attn/",
    "continual/accuracy//",
    "continual/accuracy/nul\0nul",
    "continual/accuracy/nul␀nul",
    "continual/accuracy/Ärger",
    "continual/accuracy/ärger",
    "continual/accuracy/\N{KELVIN SIGN}k",
    "continual/accuracy/K\N{KELVIN SIGN}",
    "continual/accuracy/🐙\n\t ?1 :x @y $z %s",
    "'/'",
    "select/from where",
    "x y/ ",
    " /NULL",
]


def columns(folder: Path) -> dict[str, tuple[str, str]]:
    with closing(sqlite3.connect(folder / "run.db")) as db:
        return {name: (table, column) for name, table, column in db.execute("SELECT * FROM series")}


@pytest.mark.parametrize("at_once", [True, False])
def test_hostile_names_keep_their_values_apart(tmp_path: Path, at_once: bool) -> None:
    row = {name: float(number) for number, name in enumerate(HOSTILE)}
    with closing(Writer(tmp_path)) as writer:
        for factor in (2, 1):  # once to make the columns, once to find and replace them
            cells = {name: factor * row[name] for name in row}
            writer.write([(0, cells)] if at_once else [(0, {name: cells[name]}) for name in row])
    with closing(Writer(tmp_path)) as writer:
        writer.write([(1, row)])
    run = Run(tmp_path)
    assert run.names == sorted(HOSTILE)
    assert dict(run.rows()) == {0: row, 1: row}
    assert {name: run[name][0] for name in run.names} == row


def test_ordinary_names_are_their_own_table_and_column(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(3, {"curvature/sharpness": 2.0, "gradients/norm/blocks.3.attn": -0.0})])
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        assert db.execute('SELECT step, "sharpness" FROM curvature').fetchall() == [(3, 2.0)]
        found = db.execute('SELECT "norm/blocks.3.attn" FROM gradients').fetchall()
    assert str(found) == "[(-0.0,)]"


def test_a_stream_may_outgrow_a_table(tmp_path: Path) -> None:
    names = [f"gradients/norm/{number}" for number in range(4500)]
    rows = [
        (step, {name: step + index / 4500 for index, name in enumerate(names)}) for step in (0, 1)
    ]
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, dict.fromkeys(names[:1990], 0.0))])
        writer.write(rows)
        writer.write([(2, {"gradients/late": 7.0})])
    with closing(Writer(tmp_path)) as writer:  # finds the table that still has room
        writer.write([(3, {"gradients/later": 8.0})])
    run = Run(tmp_path)
    assert dict(run.rows()) == dict(
        [*rows, (2, {"gradients/late": 7.0}), (3, {"gradients/later": 8.0})]
    )
    tables = {table for table, _ in columns(tmp_path).values()}
    assert tables == {"gradients", "gradients__2", "gradients__3"}
    assert columns(tmp_path)["gradients/later"] == ("gradients__3", "later")


@given(
    st.lists(
        st.tuples(st.text("aAé_2", min_size=1), st.text("bBsStep_2é/", min_size=1)), unique=True
    ),
    st.integers(2, 5),
    st.integers(0, 10),
)
def test_no_two_series_share_a_column_and_no_table_is_too_wide(
    parts: list[tuple[str, str]], capacity: int, known: int
) -> None:
    names = [f"{area}/{rest}" for area, rest in parts]
    before = place(names[:known], {}, capacity)
    placed = before | place(names[known:], before, capacity)
    assert list(placed) == names
    assert len({(table.lower(), column.lower()) for table, column in placed.values()}) == len(names)
    tables = [table for table, _ in placed.values()]
    assert len({table.lower() for table in tables}) == len(set(tables))
    assert max(map(tables.count, tables), default=0) < capacity
    assert all(column.lower() != "step" for _, column in placed.values())


@pytest.mark.parametrize("name", ["loss", "", "/", "/loss", "train/", "train/\ud800"])
def test_what_is_no_name_is_refused_and_the_writer_goes_on(tmp_path: Path, name: str) -> None:
    with closing(Writer(tmp_path)) as writer:
        with pytest.raises(DyndiagError, match="series"):
            writer.write([(0, {"train/loss": 1.0, name: 1.0})])
        writer.write([(0, {"train/loss": 2.0})])
    assert dict(Run(tmp_path).rows()) == {0: {"train/loss": 2.0}}
