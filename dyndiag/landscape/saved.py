"""Points of a landscape, measured one by one, and kept in a file from which a run goes on."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dyndiag.errors import DyndiagError

Floats: TypeAlias = NDArray[np.float64]

_FORMAT = 1
_KIND = "another kind of landscape"
_NOT_OURS = (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile)
"""What reading raises of a file that holds something else."""
_SECONDS = 1.0
"""Between two writes of the file."""
_AGREEMENT = 1e-4
"""Relative difference of one loss, measured twice, that kernels without a fixed order may make."""


def measure(
    points: Floats,
    at: Callable[[Floats], tuple[float, ...]],
    width: int,
    resume: str | os.PathLike[str] | None,
    kind: str,
    identity: Callable[[], Mapping[str, str]],
    skipped: Callable[[int], None],
) -> Floats:
    """(n, width): what `at` gives at each of the points (n, d), in their order.

    With `resume`, every finished point is kept in that file: written as a whole and then moved
    into place, at most once a second, when all is done, and when an error or Ctrl-C ends it. Points
    that the file has already are `skipped`; the first of them is measured again, and must agree.
    A file of another `kind` of landscape is refused, and one whose `identity` differs: fingerprints
    by what is said of a file where they are not the same.
    """
    if resume is None:
        return np.array([at(point) for point in points], dtype=np.float64).reshape(-1, width)
    file = _File(Path(resume), points, width, {_KIND: f"{kind} {_FORMAT}", **identity()})
    if file.done.any():
        first = int(file.done.argmax())
        again = at(points[first])
        if not np.allclose(file.values[first], again, rtol=_AGREEMENT, atol=0.0, equal_nan=True):
            raise DyndiagError(
                f"{file.path} is of another loss function: at its first point it has "
                f"{file.values[first][0]:.6g}, which is {again[0]:.6g} now; pass another path, or "
                "delete it"
            )
        skipped(int(file.done.sum()) - 1)
    try:
        for i in np.flatnonzero(~file.done):
            file.keep(int(i), at(points[i]))
    finally:
        file.write()
    return file.values


class _File:
    """The points of one measurement, what is known of them, and the file that it is kept in."""

    def __init__(self, path: Path, points: Floats, width: int, identity: Mapping[str, str]) -> None:
        self.path, self._points, self._unsaved = path, points, True
        self._identity = dict(identity)
        self.values = np.full((len(points), width), np.nan)
        self.done = np.zeros(len(points), dtype=bool)
        if path.exists():
            self._read()
        try:
            self.write()  # a place that cannot be written is found out before hours of work
        except OSError as error:
            raise DyndiagError(
                f"{path} cannot be written ({error}): pass a path in a folder of yours"
            ) from error

    def keep(self, i: int, values: tuple[float, ...]) -> None:
        self.values[i], self.done[i], self._unsaved = values, True, True
        if time.monotonic() - self._written >= _SECONDS:
            self.write()

    def write(self) -> None:
        """All of it under a name of its own, then moved over the old file: never half a file."""
        if not self._unsaved:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as out:
            np.savez(
                out,
                identity=np.array(json.dumps(self._identity)),
                points=self._points,
                values=self.values,
                done=self.done,
            )
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self.path)
        self._written, self._unsaved = time.monotonic(), False

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                found: dict[str, Any] = {name: kept[name] for name in kept.files}
            identity = json.loads(str(found["identity"]))
            points, values, done = (found[name] for name in ("points", "values", "done"))
            filled = values.shape == self.values.shape and done.shape == self.done.shape
        except _NOT_OURS as error:
            raise DyndiagError(
                f"{self.path} is not a file that a landscape was kept in: pass another path"
            ) from error
        differs = [name for name, mark in self._identity.items() if identity.get(name) != mark]
        if not (filled and np.array_equal(points, self._points)):
            differs.append("another grid")
        if differs[:1] == [_KIND]:
            differs = [f"{_KIND} ({identity.get(_KIND, 'an unknown one')})"]
        if differs:
            raise DyndiagError(
                f"{self.path} is of {' and '.join(differs)}: pass another path, or delete it"
            )
        self.values, self.done, self._unsaved = values, done, False
        self._written = time.monotonic()
