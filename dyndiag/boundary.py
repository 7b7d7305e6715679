"""The one place where dyndiag catches everything, so that nothing of its own stops a training."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from types import TracebackType
from typing import Any


def _outside() -> int:
    """Stack level, seen from the caller, of the user's line that called into dyndiag.

    By way of torch, where the training's own forward or optimizer step did.
    """
    frame, level, outside = sys._getframe(1), 1, 1
    inside = True
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        inside = package == "dyndiag" or (inside and package == "torch")
        if inside:
            outside = level + 1
        frame, level = frame.f_back, level + 1
    return outside


class DyndiagWarning(UserWarning):
    """Something could not be measured or kept; the training goes on."""


class Boundary:
    """Catches what a named part raises, tells it once, counts it."""

    def __init__(self) -> None:
        self.step = 0
        self.notices: list[dict[str, Any]] = []
        """What was told: step, source, text; for the run's metadata."""
        self.failures: Counter[str] = Counter()
        """How often each part has failed."""
        self._fresh: list[str] = []
        self._told: set[tuple[str, str]] = set()
        self._parts: dict[str, Part] = {}

    def __call__(self, name: str) -> Part:
        """`with boundary(name):` lets no failure of the named part out of the block."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part(self, name)
        return part

    def caught(self, name: str, error: Exception) -> None:
        """Count a failure of a part; tell the first."""
        self.failures[name] += 1
        self._fresh.append(name)
        if self.failures[name] == 1:
            self.tell(
                name,
                f"{name} failed at step {self.step}: {str(error) or type(error).__name__}. "
                "Training goes on; the values it would have given are missing.",
            )

    def tell(self, source: str, text: str) -> None:
        """Warn the user, once for each source and text, and keep it for the report."""
        if (source, text) in self._told:
            return
        self._told.add((source, text))
        self.note(source, text)
        try:
            warnings.warn(f"dyndiag: {text}", DyndiagWarning, stacklevel=_outside())
        except DyndiagWarning:  # with -W error a warning would stop the training
            print(f"dyndiag: {text}", file=sys.stderr)

    def note(self, source: str, text: str) -> None:
        """Keep a sentence for the report without a warning."""
        self.notices.append({"step": self.step, "source": source, "text": text})

    def failed(self) -> list[str]:
        """Names of the parts that failed since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh


class Part:
    """A block whose failures stop here. It is entered at every hook of a training step, so it is
    made once: a generator-based context manager costs several times as much."""

    __slots__ = ("_boundary", "_name")

    def __init__(self, boundary: Boundary, name: str) -> None:
        self._boundary, self._name = boundary, name

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):  # Ctrl-C and the like go on
            return False
        self._boundary.caught(self._name, error)
        return True
