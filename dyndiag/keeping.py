"""From rows to what is kept: judge them, write them, show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dyndiag.boundary import Boundary
from dyndiag.detectors import default_detectors
from dyndiag.rows import Row
from dyndiag.sinks import Sink, TensorBoard
from dyndiag.store import Run, Writer
from dyndiag.values import Event


class Keeper:
    """The run on disk, its detectors and its sinks.

    What the store refuses (a full disk) is held back and tried again at the next flush; sinks
    and `on_event` see only what is kept.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int | None,
        boundary: Boundary,
        on_event: Callable[[Event], object] | None,
        tensorboard: bool,
    ) -> None:
        self._boundary, self._on_event = boundary, on_event
        self._writer = Writer(folder, first_step=first_step)
        self.next_step = self._writer.next_step
        self.before: Mapping[str, Any] = {}
        """Metadata of the run that is gone on with."""
        self._detectors = default_detectors()
        if self.next_step > 0:  # a run that goes on: the detectors have to know what came before
            self.before = Run(folder).metadata
            events: dict[tuple[Any, ...], Event] = {}
            for step, values in Run(folder).rows():
                events |= {event.name: event for event in self._judge(step, values)}
            self._writer.replace_events(list(events.values()))
        self._sinks: list[Sink] = [TensorBoard(folder / "tensorboard")] if tensorboard else []
        self._waiting: list[tuple[Row, list[Event]]] = []
        self._closed = False

    @property
    def detector_parameters(self) -> dict[str, dict[str, float]]:
        """For the run's metadata, so that the replay judges by the same thresholds."""
        return {detector.kind: dict(detector.parameters) for detector in self._detectors}

    def keep(self, rows: list[Row], metadata: Mapping[str, Any]) -> int:
        """Judge, write and show rows in step order; the number that could not be written."""
        if self._closed:
            return len(self._waiting) + len(rows)
        for step, values in rows:
            self._waiting.append(((step, values), self._judge(step, values)))
        with self._boundary("Store"):
            self._writer.write(
                [row for row, _ in self._waiting],
                [event for _, events in self._waiting for event in events],
                metadata,
            )
            written, self._waiting = self._waiting, []
            self._show(written)
        return len(self._waiting)

    def close(self) -> None:
        """Close the store and the sinks."""
        self._closed = True
        with self._boundary("Store"):
            self._writer.close()
        for sink in self._sinks:
            with self._boundary(type(sink).__name__):
                sink.close()

    def _judge(self, step: int, values: Mapping[str, Any]) -> list[Event]:
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        events: list[Event] = []
        for detector in self._detectors:
            with self._boundary(type(detector).__name__):
                events += detector.update(step, scalars)
        return events

    def _show(self, written: list[tuple[Row, list[Event]]]) -> None:
        for sink in self._sinks:
            with self._boundary(type(sink).__name__):
                for (step, values), events in written:
                    sink.write(step, values, events)
                sink.flush()
        if self._on_event is not None:
            for _, events in written:
                for event in events:
                    with self._boundary("on_event"):
                        self._on_event(event)
