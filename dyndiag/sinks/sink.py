"""What every destination can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from dyndiag.values import Event


class Sink(Protocol):
    """A destination for values that are already kept. It may fail: that costs the display only."""

    def write(
        self, step: int, values: Mapping[str, float | NDArray[Any]], events: Sequence[Event]
    ) -> None:
        """Take one step's values by series name, and the events that they opened, changed or
        closed. Steps come in order, each once."""

    def flush(self) -> None:
        """Show what was written so far."""

    def close(self) -> None:
        """Flush, and let go. Closing twice is allowed."""
