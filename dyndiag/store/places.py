"""Where a series lives: the table of its area, and the column of the rest of its name."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from dyndiag.errors import DyndiagError

Place: TypeAlias = tuple[str, str]
"""Table and column."""

RESERVED = frozenset({"series", "arrays", "events", "metadata", "excluded"})
"""The store's own tables, and SQL's name for the row of an upsert that was refused."""


def quoted(identifier: str) -> str:
    """The identifier as SQL takes it, whatever it holds.

    >>> print(quoted('weight "a"'))
    "weight ""a\"""
    """
    return '"' + identifier.replace('"', '""') + '"'


def split(name: str) -> tuple[str, str]:
    """Area and rest of a series' name.

    >>> split("gradients/norm/blocks.3.attn")
    ('gradients', 'norm/blocks.3.attn')
    """
    area, slash, rest = name.partition("/")
    if not (area and slash and rest):
        raise DyndiagError(f"A series is named area/quantity, like train/loss; {name!r} came.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DyndiagError(f"The series name {name!r} is not valid Unicode: rename it.") from error
    return area, rest


def place(names: Iterable[str], places: Mapping[str, Place], capacity: int) -> dict[str, Place]:
    """Places for new `names` beside those already given; a table has at most `capacity` columns.

    SQLite ignores case in names, has a few of its own, and limits the columns of a table: where
    the plain name is not to be had, the table or column gets a suffix.

    >>> place(["gradients/norm/A", "gradients/norm/a", "events/x"], {}, capacity=2000)
    {'gradients/norm/A': ('gradients', 'norm/A'), 'gradients/norm/a': ('gradients', 'norm/a__2'), \
'events/x': ('events__2', 'x')}
    """
    newest: dict[str, str] = {}  # the table of each area that still takes columns
    columns: dict[str, set[str]] = {}
    for name, (table, column) in places.items():
        newest[split(name)[0]] = table
        columns.setdefault(table, {"step"}).add(column.lower())
    taken = RESERVED | {table.lower() for table in columns}

    placed = {}
    for name in names:
        area, rest = split(name)
        if area not in newest or len(columns[newest[area]]) >= capacity:
            newest[area] = table = _free(area, taken)
            columns[table] = {"step"}
            taken |= {table.lower()}
        table = newest[area]
        column = _free(rest, columns[table])
        columns[table].add(column.lower())
        placed[name] = (table, column)
    return placed


def tables(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The columns of each table."""
    columns: dict[str, list[str]] = {}
    for table, column in places.values():
        columns.setdefault(table, []).append(column)
    return columns


def read_places(db: sqlite3.Connection) -> dict[str, Place]:
    found = db.execute('SELECT name, "table", "column" FROM series ORDER BY rowid')
    return {name: (table, column) for name, table, column in found}


def _free(wanted: str, taken: Iterable[str]) -> str:
    wanted = wanted.replace("\0", "\N{SYMBOL FOR NULL}")  # ends an SQL text
    if wanted.lower().startswith("sqlite_"):  # SQLite's own, refused as a table
        wanted = f"_{wanted}"
    name, number = wanted, 1
    while name.lower() in taken:
        number += 1
        name = f"{wanted}__{number}"
    return name
