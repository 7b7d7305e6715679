"""The file's format: which one it has, and how it is brought to this one."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dyndiag.errors import DyndiagError

APPLICATION = 0x64796E64
"""`PRAGMA application_id` of a run: 'dynd'."""

STEPS = tuple(
    re.split(
        r"^-- step \d+\n",
        files("dyndiag.store").joinpath("schema.sql").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )[1:]
)


def version_of(db: sqlite3.Connection, file: Path, steps: Sequence[str] = STEPS) -> int:
    """The format of a run's file, 0 if it is still empty.

    Raises DyndiagError if another program wrote it, or a newer dyndiag.
    """
    version, application, tables = db.execute(
        "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master)"
        " FROM pragma_user_version, pragma_application_id"
    ).fetchone()
    if application != APPLICATION and (version or application or tables):
        raise DyndiagError(
            f"{file} is a database of another program: give the run a folder of its own."
        )
    if version > len(steps):
        raise DyndiagError(
            f"{file} was written by a newer dyndiag (format {version}; this one knows up to "
            f"{len(steps)}): pip install --upgrade dyndiag."
        )
    return int(version)


def upgrade(db: sqlite3.Connection, file: Path, steps: Sequence[str] = STEPS) -> None:
    """Bring a file to the newest format; killed anywhere, it is at a whole version."""
    have = version_of(db, file, steps)
    for version, step in enumerate(steps[have:], have + 1):
        try:
            db.executescript(f"BEGIN IMMEDIATE; {step}; PRAGMA user_version = {version}; COMMIT;")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
