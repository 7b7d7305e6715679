"""What the disk under a run can do, and what SQLite's errors mean for who reads them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dyndiag.errors import DyndiagError

DATABASE = "run.db"
LOCK = "run.db-lock"

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|virtiofs|ceph|lustre|gpfs|beegfs|glusterfs|orangefs|pvfs2|wekafs"
    r"|ocfs2|gfs2|fuse(\..*)?"
)
"""FUSE is mostly remote (sshfs, gcsfuse), and a rollback journal is never wrong, only slower."""

_MEANING = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk refused (full, over a quota, or gone)",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_PERM: "access is not allowed",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened or created there",
    sqlite3.SQLITE_BUSY: "another process holds it locked",
    sqlite3.SQLITE_NOTADB: "it is damaged, or no SQLite file at all; give the folder of a run",
    sqlite3.SQLITE_CORRUPT: "it is damaged; `sqlite3 run.db .recover` may save what is readable",
}


def journal_mode(folder: Path) -> str:
    """`wal`, or `truncate` on network file systems.

    WAL keeps its index in shared memory, which network file systems do not keep coherent: it can
    crash a process there (SIGBUS). Where mounts are not to be read, the disk counts as local.
    """
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return "wal"
    return "truncate" if _NETWORK.fullmatch(file_system(folder.resolve(), mounts)) else "wal"


def file_system(path: PurePosixPath | Path, mounts: str) -> str:
    """The type of the file system that holds `path`, by a text like /proc/mounts; '' if none.

    >>> file_system(PurePosixPath("/home/me/runs"), "/dev/vda / ext4 rw\\nnas:/x /home nfs4 rw")
    'nfs4'
    """
    deepest, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found = line.split(" ", 3)[:3]
        mounted = PurePosixPath(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point))
        # A later mount hides an earlier one on the same point.
        if path.is_relative_to(mounted) and len(mounted.parts) >= deepest:
            deepest, kind = len(mounted.parts), found
    return kind


def meaning(error: sqlite3.Error) -> str:
    """What happened, in words and in SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)  # none if Python, not SQLite, refused
    words = None if code is None else _MEANING.get(code & 0xFF)
    return f"{words} ({error})" if words else str(error).rstrip(".")


@contextmanager
def told(file: Path) -> Iterator[None]:
    """SQLite's errors, and what is wrong with the file itself, as a sentence that names it."""
    try:
        yield
    except sqlite3.Error as error:
        raise DyndiagError(f"{file}: {meaning(error)}.") from error
