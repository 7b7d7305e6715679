"""Reading a run, also while it is being written. Needs no torch."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from difflib import get_close_matches
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dyndiag.errors import DyndiagError
from dyndiag.store.cells import array_from, event_from, from_json
from dyndiag.store.disks import DATABASE, told
from dyndiag.store.places import quoted, read_places
from dyndiag.store.schema import version_of
from dyndiag.values import Event

if TYPE_CHECKING:
    import pandas as pd

Steps = NDArray[np.int64]
Values = NDArray[np.float64]

_PAGE = 1 << 16
"""Cells of a table that are held at a time as Python's own numbers."""


class NoSuchSeries(DyndiagError, KeyError):
    """The run has no series, or no array, of this name."""

    __str__ = DyndiagError.__str__  # a KeyError's would put the sentence in quotes


class Run:
    """One run, read-only: `run["curvature/sharpness"]`, `run.events`, `run.metadata`.

    Takes the run's folder, or its database. May be opened while training writes: each call reads
    what is committed by then, through a connection of its own, and leaves no file behind.
    Raises DyndiagError if there is no run, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._file = path if path.is_file() else path / DATABASE
        self.folder = self._file.parent
        self.name = self.folder.resolve().name
        if not self._file.is_file():
            raise DyndiagError(_not_a_run(path))
        with told(self._file), closing(_connect(self._file)) as db:
            if not version_of(db, self._file):
                raise DyndiagError(
                    f"{self._file} is empty: its training ended before the first value was kept."
                )

    def __repr__(self) -> str:
        (events,) = self._fetch("SELECT count(*) FROM events")[0]
        return (
            f"<Run {str(self.folder)!r}: {len(self.names)} series, last step {self.last_step}, "
            f"{events} events>"
        )

    @property
    def names(self) -> list[str]:
        """The names of all series of scalars, sorted."""
        return sorted(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> pd.Series[float]:
        """Values by step, float64. NaN: measured, and not a number. No such step: not measured."""
        import pandas as pd  # takes longer to import than all the rest

        places = self._places
        if name not in places:
            raise NoSuchSeries(_no_such(self.folder, "series", name, sorted(places)))
        table, column = places[name]
        [(steps, values)] = self._columns(table, {column: name}).values()
        return pd.Series(values, index=pd.Index(steps, name="step"), name=name)

    def columns(self) -> Iterator[tuple[str, Steps, Values]]:
        """Every series as (name, steps, values), sorted by name; a stream is read at a time, and
        once: a third of the time that each series by itself would take."""
        held: dict[str, tuple[Steps, Values]] = {}
        tables = self._series_by_column()
        for name in self.names:
            if name not in held:
                table, _ = self._places[name]
                held |= self._columns(table, tables[table])
            yield name, *held.pop(name)

    def _columns(self, table: str, names: dict[str, str]) -> dict[str, tuple[Steps, Values]]:
        """The series of some columns of a table, page by page."""
        parts: dict[str, list[tuple[Steps, Values]]] = {name: [] for name in names.values()}
        wanted = ", ".join(map(quoted, names))
        measured = f" AND {wanted} IS NOT NULL" if len(names) == 1 else ""
        limit = max(1, _PAGE // len(names))
        found = self._fetch(f"SELECT min(step) - 1 FROM {quoted(table)}")
        while found and found[-1][0] is not None:
            found = self._fetch(
                f"SELECT step, {wanted} FROM {quoted(table)} WHERE step > ?{measured}"
                f" ORDER BY step LIMIT {limit}",
                found[-1][0],
            )
            steps, *columns = zip(*found, strict=True) if found else ((),)
            all_steps = np.array(steps, dtype=np.int64)
            for name, cells in zip(names.values(), columns, strict=False):
                parts[name].append(_measured(all_steps, cells))
        return {
            name: (
                np.concatenate([steps for steps, _ in pages] or [np.empty(0, np.int64)]),
                np.concatenate([values for _, values in pages] or [np.empty(0)]),
            )
            for name, pages in parts.items()
        }

    @property
    def array_names(self) -> list[str]:
        """The names of all series of arrays, sorted."""
        return [name for (name,) in self._fetch("SELECT DISTINCT name FROM arrays ORDER BY name")]

    def arrays(self, name: str) -> dict[int, NDArray[Any]]:
        """Arrays by step, each as it was written."""
        found = self._fetch(
            "SELECT step, dtype, shape, data FROM arrays WHERE name = ? ORDER BY step", name
        )
        if not found:
            raise NoSuchSeries(_no_such(self.folder, "array", name, self.array_names))
        return {step: array_from(*cells) for step, *cells in found}

    @property
    def events(self) -> pd.DataFrame:
        """One event a line: kind, start, peak, end (missing while open), severity, confidence,
        series (a tuple of names), details (a dict)."""
        import pandas as pd

        events = self.event_list()
        return pd.DataFrame(
            {
                "kind": pd.Series([event.kind for event in events], dtype="str"),
                "start": pd.Series([event.start for event in events], dtype="int64"),
                "peak": pd.Series([event.peak for event in events], dtype="int64"),
                "end": pd.Series([event.end for event in events], dtype="Int64"),
                "severity": pd.Series([event.severity for event in events], dtype="float64"),
                "confidence": pd.Series([event.confidence for event in events], dtype="float64"),
                "series": pd.Series([event.series for event in events], dtype="object"),
                "details": pd.Series([event.details for event in events], dtype="object"),
            }
        )

    def event_list(self) -> list[Event]:
        """The events, sorted by start, kind and series."""
        found = self._fetch(
            'SELECT kind, start, peak, "end", severity, confidence, series, details FROM events'
        )
        return sorted(map(event_from, found), key=lambda event: (event.start, *event.name))

    @property
    def metadata(self) -> dict[str, Any]:
        """What was noted of the run: versions, model, optimizer, tasks, cost, …; any key may be
        missing, `finished` while it runs or if it was killed."""
        found = self._fetch("SELECT key, value FROM metadata ORDER BY rowid")
        return {key: from_json(value) for key, value in found}

    @property
    def last_step(self) -> int | None:
        """The last step that has a scalar; None if none has."""
        steps = [
            step
            for table in self._series_by_column()
            for (step,) in self._fetch(f"SELECT max(step) FROM {quoted(table)}")
            if step is not None
        ]
        return max(steps, default=None)

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each step's scalars, over all streams, in step order, as they were when it began.

        Holds some thousand rows at a time; about 15 µs a row of 30 values.
        """
        last = self.last_step  # written by then, in all tables: a row is one transaction
        if last is None:
            return
        streams = [
            self._table_rows(table, names, last)
            for table, names in self._series_by_column().items()
        ]
        merged = heapq.merge(*streams, key=itemgetter(0))
        for step, parts in groupby(merged, key=itemgetter(0)):
            values: dict[str, float] = {}
            for _, part in parts:
                values |= part
            yield step, values

    def _table_rows(
        self, table: str, names: dict[str, str], last: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        # Page by page, so that no lock is held while the caller thinks.
        limit = max(1, _PAGE // len(names))
        page = (
            f"SELECT step, {', '.join(map(quoted, names))} FROM {quoted(table)}"
            f" WHERE step > ? AND step <= ? ORDER BY step LIMIT {limit}"
        )
        found = self._fetch(f"SELECT min(step) - 1 FROM {quoted(table)}")
        while found and found[-1][0] is not None:
            found = self._fetch(page, found[-1][0], last)
            for step, *cells in found:
                yield (
                    step,
                    {
                        name: float(value)
                        for name, value in zip(names.values(), cells, strict=True)
                        if value is not None
                    },
                )

    @property
    def _places(self) -> dict[str, tuple[str, str]]:
        with told(self._file), closing(_connect(self._file)) as db:
            return read_places(db)

    def _series_by_column(self) -> dict[str, dict[str, str]]:
        """Each table's columns, and the series that each holds."""
        series: dict[str, dict[str, str]] = {}
        for name, (table, column) in self._places.items():
            series.setdefault(table, {})[column] = name
        return series

    def _fetch(self, query: str, *cells: object) -> list[Any]:
        with told(self._file), closing(_connect(self._file)) as db:
            return db.execute(query, cells).fetchall()


def _measured(steps: Steps, cells: tuple[object, ...]) -> tuple[Steps, Values]:
    """Where a column holds something, and what: NULL is not measured, the text 'nan' is NaN."""
    if None not in cells:
        return steps, np.array(cells, dtype=np.float64)
    here = np.array([cell is not None for cell in cells], dtype=bool)
    return steps[here], np.array([cell for cell in cells if cell is not None], dtype=np.float64)


def _connect(file: Path) -> sqlite3.Connection:
    """A read-only connection that makes no file.

    Without a log or journal beside it nobody is writing and the database is whole: SQLite may take
    it as immutable, which needs no lock, nor the right to write in the folder. With one, reading
    goes through it.
    """
    beside = [file.with_name(file.name + suffix) for suffix in ("-wal", "-journal")]
    at_rest = not any(other.exists() for other in beside)
    address = file.resolve().as_uri()
    db = sqlite3.connect(f"{address}?mode=ro{'&immutable=1' if at_rest else ''}", uri=True)
    try:
        db.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        db.close()
        # Its writer was killed in the midst of a commit: whoever comes next must undo that.
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        return sqlite3.connect(f"{address}?mode=rw", uri=True)
    return db


def _not_a_run(path: Path) -> str:
    why = f"it holds no {DATABASE}" if path.is_dir() else "there is no such folder"
    for where, folder in (("in", path), ("beside", path.parent)):
        runs = sorted(found.parent.name for found in folder.glob(f"*/{DATABASE}"))
        if runs:
            return f"{path} is not a run: {why}. Runs {where} it: {_listed(runs)}."
    return f"{path} is not a run: {why}."


def _no_such(folder: Path, what: str, name: str, names: list[str]) -> str:
    near = get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        return f"{folder} has no {what} {name!r}. Nearest: {', '.join(near)}."
    return f"{folder} has no {what} {name!r}. It has: {_listed(names)}."


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"
