"""Writing a run: rows, arrays, events and metadata, each write one transaction."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import lru_cache
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from dyndiag.errors import DyndiagError
from dyndiag.store.cells import Cell, array_cells, event_cells, scalar_cells, to_json
from dyndiag.store.disks import DATABASE, LOCK, journal_mode, told
from dyndiag.store.places import Place, place, quoted, read_places, tables
from dyndiag.store.schema import upgrade
from dyndiag.values import Event

Row: TypeAlias = tuple[int, Mapping[str, float | NDArray[Any]]]
"""What one optimizer step gave: the step, and the values by series name."""

_Scalars: TypeAlias = tuple[int, Mapping[str, float]]
_Part: TypeAlias = tuple[str, str, Callable[[list[Cell]], tuple[Cell, ...]]]

_UPSERT_ARRAY = "INSERT OR REPLACE INTO arrays (name, step, dtype, shape, data) VALUES (?,?,?,?,?)"
_UPSERT_EVENT = (
    'INSERT OR REPLACE INTO events (kind, start, peak, "end", severity, confidence, series,'
    " details) VALUES (?,?,?,?,?,?,?,?)"
)
_UPSERT_METADATA = "INSERT OR REPLACE INTO metadata (key, value) VALUES (?,?)"


class Writer:
    """The one writer of the run in `folder`, which is made if it is not there.

    What `write` returned from survives the process, however it ends. After a failed write nothing
    of it is in the file, and the same rows can be written again. For one thread at a time, and
    only in the process that opened it: a fork neither holds the lock nor may write.

    Raises DyndiagError where the folder holds something else or cannot be written, where another
    writer has it (told by a lock that the system frees when the process ends), and where a newer
    dyndiag wrote it.
    """

    next_step: int
    """The step that the run goes on with: one after its last row, or `first_step`."""

    def __init__(self, folder: Path, *, first_step: int | None = None) -> None:
        """With `first_step`, what the run has from there on goes: rows, arrays, and the events
        that start there."""
        self._file = Path(folder) / DATABASE
        self._process = os.getpid()
        _prepare(Path(folder))
        with told(self._file), ExitStack() as opened:
            opened.enter_context(closing(_lock(Path(folder))))
            self._db = opened.enter_context(closing(_connect(self._file)))
            upgrade(self._db, self._file)
            self._places = read_places(self._db)
            self._capacity = min(  # of one table: each column is also a variable of its INSERT
                self._db.getlimit(sqlite3.SQLITE_LIMIT_COLUMN),
                self._db.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER),
            )
            self.next_step = self._after_last() if first_step is None else first_step
            self._forget(self.next_step)
            self._note_restart()
            self._opened = opened.pop_all()

    def write(
        self,
        rows: Sequence[Row],
        events: Iterable[Event] = (),
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Keep rows, events and metadata, all or none.

        A value replaces that of the same step and series, an event that of the same name, and
        metadata, which JSON must be able to hold, that of the same key. For 40 values about 30 µs
        a row where ten are written at once, 100 µs where each is a write of its own.
        """
        scalars, arrays = _parted(rows)
        facts = [(key, to_json(value)) for key, value in (metadata or {}).items()]
        with self._transaction() as db:
            self._make_room(dict.fromkeys(chain.from_iterable(values for _, values in scalars)))
            for statement, cells in _upserts(scalars, self._places):
                db.executemany(statement, cells)
            db.executemany(_UPSERT_ARRAY, arrays)
            db.executemany(_UPSERT_EVENT, map(event_cells, events))
            db.executemany(_UPSERT_METADATA, facts)

    def replace_events(self, events: Iterable[Event]) -> None:
        """Keep these events and no others."""
        with self._transaction() as db:
            db.execute("DELETE FROM events")
            db.executemany(_UPSERT_EVENT, map(event_cells, events))

    def write_metadata(self, metadata: Mapping[str, object]) -> None:
        """Set these keys, to values that JSON can hold; the others stay as they are."""
        self.write([], metadata=metadata)

    def close(self) -> None:
        """Leave one plain file. Closing twice is allowed; a fork's closing does nothing."""
        if os.getpid() != self._process:
            return
        # Without its -wal file a finished run can be copied, and read in a read-only folder. Where
        # that cannot be had (somebody is reading, the disk is full) the log stays, and is read.
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA journal_mode = delete")
        self._opened.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._process:
            raise DyndiagError(
                f"{self._file} can be written only by process {self._process}, which opened it; "
                f"this is its fork {os.getpid()}."
            )
        places = self._places
        with told(self._file):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._places = places
                with suppress(sqlite3.Error):  # a full disk has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def _make_room(self, names: Iterable[str]) -> None:
        """A column for each name that has none."""
        new = [name for name in names if name not in self._places]
        if not new:
            return
        placed = place(new, self._places, self._capacity)
        known = tables(self._places)
        for table, columns in tables(placed).items():
            if table not in known:
                listed = "".join(f", {quoted(column)}" for column in columns)
                self._db.execute(f"CREATE TABLE {quoted(table)} (step INTEGER PRIMARY KEY{listed})")
                continue
            for column in columns:
                self._db.execute(f"ALTER TABLE {quoted(table)} ADD COLUMN {quoted(column)}")
        self._db.executemany(
            'INSERT INTO series (name, "table", "column") VALUES (?,?,?)',
            [(name, *at) for name, at in placed.items()],
        )
        self._places = self._places | placed

    def _forget(self, first_step: int) -> None:
        """Delete what is from this step on; where there is nothing, see that one may write."""
        with self._transaction() as db:
            for table in [*map(quoted, tables(self._places)), "arrays"]:
                db.execute(f"DELETE FROM {table} WHERE step >= ?", (first_step,))
            db.execute("DELETE FROM events WHERE start >= ?", (first_step,))

    def _note_restart(self) -> None:
        """Keep, as `restarts`, the steps at which the run was gone on with: what moves there may
        come from what was not restored."""
        (kept,) = self._db.execute(
            "SELECT coalesce(max(value), '[]') FROM metadata WHERE key = 'restarts'"
        ).fetchone()
        restarts = [step for step in json.loads(kept) if step < self.next_step]
        if self._after_last() > 0:
            restarts.append(self.next_step)
        if restarts:
            self.write_metadata({"restarts": restarts})
        elif json.loads(kept):
            with self._transaction() as db:
                db.execute("DELETE FROM metadata WHERE key = 'restarts'")

    def _after_last(self) -> int:
        last = -1
        for table in [*map(quoted, tables(self._places)), "arrays"]:
            (step,) = self._db.execute(f"SELECT max(step) FROM {table}").fetchone()
            last = max(last, -1 if step is None else step)
        return last + 1


def _prepare(folder: Path) -> None:
    """Make the folder, or see that it is empty or a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise DyndiagError(
            f"{folder} cannot be made a run's folder ({error.strerror}): choose another."
        ) from error
    if DATABASE not in held and held - {LOCK}:
        raise DyndiagError(
            f"{folder} holds other files and no {DATABASE}: choose an empty or a new folder."
        )


def _lock(folder: Path) -> sqlite3.Connection:
    """Take the run for this writer, for as long as the connection is open.

    SQLite's own file lock on an empty database: it is the process's, so it goes with it even on
    kill -9, forked workers do not inherit it, and a second writer in the same process meets it
    too. It has a file of its own, which stays: whoever removed it could remove another's.
    """
    lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lock.execute("PRAGMA journal_mode = off")  # or there would be a file for it
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        raise DyndiagError(
            f"{folder} is being written by another monitor, in this process or another: close "
            "that one, or choose another folder."
        ) from error
    return lock


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, isolation_level=None, check_same_thread=False, cached_statements=512)
    try:
        db.execute("PRAGMA mmap_size = 0")
        db.execute(f"PRAGMA journal_mode = {journal_mode(file.parent)}")
        db.execute("PRAGMA synchronous = normal")
    except BaseException:
        db.close()
        raise
    return db


def _parted(rows: Sequence[Row]) -> tuple[list[_Scalars], list[tuple[object, ...]]]:
    """The rows' scalars, and their arrays as cells."""
    scalars: list[_Scalars] = []
    arrays: list[tuple[object, ...]] = []
    for step, values in rows:
        if {*map(type, values.values())} != {float}:  # seldom, and looking at each takes longer
            held = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
            arrays += [array_cells(name, int(step), array) for name, array in held.items()]
            values = {name: value for name, value in values.items() if name not in held}
        scalars.append((int(step), cast("Mapping[str, float]", values)))
    return scalars, arrays


def _upserts(
    rows: Iterable[_Scalars], places: Mapping[str, Place]
) -> Iterator[tuple[str, Iterator[tuple[Cell, ...]]]]:
    """Statements, each with the cells of as many rows in a row as it serves."""
    plans: dict[tuple[str, ...], list[_Part]] = {}
    queues: dict[str, list[tuple[str, tuple[Cell, ...]]]] = {}
    for step, values in rows:
        names = tuple(values)
        if names not in plans:
            plans[names] = _plan(tuple(places[name] for name in names))
        cells = [step, *scalar_cells(values.values())]
        for table, statement, pick in plans[names]:
            queues.setdefault(table, []).append((statement, pick(cells)))
    for queue in queues.values():
        for statement, group in groupby(queue, key=itemgetter(0)):
            yield statement, (cells for _, cells in group)


@lru_cache(maxsize=512)
def _plan(places: tuple[Place, ...]) -> list[_Part]:
    """How values for these places go into their tables: into each by one statement, which takes
    some of the cells [step, value by value]."""
    parts: dict[str, dict[str, int]] = {}
    for index, (table, column) in enumerate(places, 1):
        parts.setdefault(table, {})[quoted(column)] = index
    return [
        (table, _upsert(table, list(columns)), itemgetter(0, *columns.values()))
        for table, columns in parts.items()
    ]


def _upsert(table: str, columns: list[str]) -> str:
    return (
        f"INSERT INTO {quoted(table)} (step, {', '.join(columns)})"
        f" VALUES (?{', ?' * len(columns)}) ON CONFLICT (step) DO UPDATE SET "
        + ", ".join(f"{column} = excluded.{column}" for column in columns)
    )
