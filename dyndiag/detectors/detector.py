"""What every detector is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from dyndiag.values import Event


class Detector(Protocol):
    """Turns a run's values into events of one kind, one step at a time.

    A detector is a dataclass: its fields are its thresholds, everything else follows from the rows
    it was given, in order. It never looks ahead for a start, and its memory is bounded.
    """

    kind: ClassVar[str]

    @property
    def parameters(self) -> dict[str, float]:
        """Its thresholds by name, enough to build it again."""
        ...

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """Take one step's values; return the events that they opened, changed or closed."""
        ...
