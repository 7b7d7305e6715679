"""The file is an interface: its format changes only by a numbered step, whole or not at all."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dyndiag.errors import DyndiagError
from dyndiag.store import Run, Writer
from dyndiag.store.schema import STEPS, upgrade
from dyndiag.values import Event

FORMAT_1 = {
    "series": ["name TEXT", "table TEXT", "column TEXT"],
    "arrays": ["name TEXT", "step INTEGER", "dtype TEXT", "shape TEXT", "data BLOB"],
    "events": ["kind TEXT", "start INTEGER", "peak INTEGER", "end INTEGER", "severity ",
               "confidence ", "series TEXT", "details TEXT"],
    "metadata": ["key TEXT", "value TEXT"],
    "train": ["step INTEGER", "loss ", "learning_rate "],
}  # fmt: skip


def shape(file: Path) -> tuple[int, dict[str, list[str]]]:
    """The format's number, and the columns of each table with their types."""
    with closing(sqlite3.connect(file)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        query = "SELECT name || ' ' || type FROM pragma_table_info(?)"
        return version, {name: [c for (c,) in db.execute(query, (name,))] for (name,) in tables}


def test_the_format_is_frozen(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0, "train/learning_rate": 0.1})])
    assert shape(tmp_path / "run.db") == (1, FORMAT_1)


def test_plain_sqlite_reads_a_run(tmp_path: Path) -> None:
    event = Event("loss_spike", 1, 2, None, 3.5, 0.9, ("train/loss",), {"median": 2.0})
    rows = [(0, {"train/loss": 1.0}), (1, {"train/loss": float("nan"), "stability/warmup": 1.0})]
    with closing(Writer(tmp_path)) as writer:
        writer.write(rows, [event])
        writer.write_metadata({"model": {"class": "MLP"}})
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:

        def ask(query: str) -> list[tuple[object, ...]]:
            return db.execute(query).fetchall()

        assert ask('SELECT step, "loss" FROM train') == [(0, 1.0), (1, "nan")]
        joined = "SELECT loss, warmup FROM train LEFT JOIN stability USING (step)"
        assert ask(joined) == [(1.0, None), ("nan", 1.0)]
        assert ask(
            "SELECT kind, start, \"end\", json_extract(details, '$.median') FROM events"
        ) == [("loss_spike", 1, None, 2.0)]
        assert ask("SELECT json_extract(value, '$.class') FROM metadata") == [("MLP",)]
        assert ask("SELECT * FROM series WHERE name = 'train/loss'") == [
            ("train/loss", "train", "loss")
        ]


def test_a_closed_run_is_one_plain_file_and_an_empty_lock(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0})])
        held = sorted(file.name for file in tmp_path.iterdir())
        assert held == ["run.db", "run.db-lock", "run.db-shm", "run.db-wal"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.db", "run.db-lock"]
    assert (tmp_path / "run.db-lock").stat().st_size == 0


def test_a_newer_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    Writer(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        db.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    for opens in (Writer, Run):
        with pytest.raises(
            DyndiagError, match=r"newer dyndiag \(format 2; .* pip install --upgrade"
        ):
            opens(tmp_path)
    assert shape(tmp_path / "run.db")[0] == 2


@pytest.mark.parametrize("set_up", ["CREATE TABLE notes (text)", "PRAGMA user_version = 1"])
def test_another_programs_database_is_left_alone(tmp_path: Path, set_up: str) -> None:
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        db.execute(set_up)
    before = shape(tmp_path / "run.db")
    for opens in (Writer, Run):
        with pytest.raises(DyndiagError, match="another program"):
            opens(tmp_path)
    assert shape(tmp_path / "run.db") == before


def test_an_upgrade_runs_only_the_steps_that_lack(tmp_path: Path) -> None:
    Writer(tmp_path).close()
    file = tmp_path / "run.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        upgrade(db, file, [*STEPS, "ALTER TABLE events ADD COLUMN note; CREATE TABLE extra (x);"])
        upgrade(db, file, [*STEPS, "never run again"])
    version, tables = shape(file)
    assert version == 2
    assert tables["events"][-1] == "note "
    assert "extra" in tables


def test_a_step_that_fails_midway_leaves_the_format_before_it(tmp_path: Path) -> None:
    Writer(tmp_path).close()
    file = tmp_path / "run.db"
    before = shape(file)
    fails = "CREATE TABLE extra (x); ALTER TABLE events ADD COLUMN note; DELETE FROM nowhere;"
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            upgrade(db, file, [*STEPS, "CREATE TABLE whole (x);", fails])
        assert not db.in_transaction
    assert shape(file) == (2, {**before[1], "whole": ["x "]})
