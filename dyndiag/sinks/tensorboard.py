"""A run in TensorBoard: one record a step with all its values, and a page that explains them."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:  # only those who ask for it pay
    from tensorboard.compat.proto.event_pb2 import Event as Record
    from tensorboard.compat.proto.event_pb2 import SessionLog, SourceMetadata
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.custom_scalar import metadata as custom_scalars
    from tensorboard.plugins.text import metadata as texts
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "TensorBoard output needs one more package: pip install tensorboard"
    ) from missing

from dyndiag.errors import DyndiagError
from dyndiag.sinks.density import Axes, axes_for, draw
from dyndiag.sinks.layout import EDGE, EDGE_RATIO, PRECONDITIONED, SHARPNESS, layout, margins
from dyndiag.sinks.records import record
from dyndiag.values import Event

_MARGINS = (SHARPNESS, PRECONDITIONED)
_DENSITY = "curvature/density"
_MOST_WAITING = 1 << 24
_MOST_RECORDS = 16


class TensorBoard:
    """Writes event files into `folder` that TensorBoard shows; the values' tags are their names.

    Nothing is on the disk before `flush`, and everything is after it. Where the disk is full
    `flush` raises OSError, keeps what waits, and can be called again; with 16 MiB waiting `write`
    tries it first, and refuses the step if that fails. About 15 µs a step of 40 values, in the
    caller's thread: there is no other.

    A folder that already holds a run is gone on with: from the first step written on, TensorBoard
    forgets what it had read there.
    """

    def __init__(self, folder: Path) -> None:
        # TensorBoard reads a folder's files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        origin = f"{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"events.out.tfevents.{origin}").open("xb", buffering=0)
        except OSError as error:
            raise DyndiagError(
                f"TensorBoard's files cannot be written into {folder} ({error.strerror})."
            ) from error
        self._waiting = bytearray()
        self._page: bool | None = None  # the layout that is written: with a preconditioner or not
        self._axes: Axes | None = None
        self._records: dict[tuple[str, ...], tuple[Record, tuple[Summary.Value, ...]]] = {}
        self._told: dict[tuple[Any, ...], tuple[int, int | None]] = {}
        self._add(
            Record(
                wall_time=time.time(),
                file_version="brain.Event:2",
                source_metadata=SourceMetadata(writer="dyndiag"),
            )
        )

    def write(
        self, step: int, values: Mapping[str, float | NDArray[Any]], events: Sequence[Event]
    ) -> None:
        """Take one step: its scalars, a text for each event that is new, has a new peak or has
        ended, and a picture of the spectral density (about 35 ms).

        An estimate that is neither converged nor provisional goes to `…/not_converged`; its error,
        bounds and status are no tags of their own.
        """
        if len(self._waiting) > _MOST_WAITING:
            self.flush()
        now = time.time()
        preconditioned = PRECONDITIONED in values
        if self._page is None:
            start = SessionLog(status=SessionLog.START)
            self._add(Record(wall_time=now, step=step, session_log=start))
        if self._page is None or preconditioned > self._page:
            self._page = preconditioned
            page = _text(custom_scalars.CONFIG_SUMMARY_TAG, layout(preconditioned))
            page.metadata.CopyFrom(custom_scalars.create_summary_metadata())
            self._add(Record(wall_time=now, step=step, summary=Summary(value=[page])))

        self._add(self._scalars(now, step, _tagged(values)))

        for event in events:
            if self._told.get(event.name) != (event.peak, event.end):
                self._told[event.name] = (event.peak, event.end)
                text = _text(f"events/{event.kind}", markdown(event).encode())
                text.metadata.CopyFrom(texts.create_summary_metadata("", ""))
                self._add(Record(wall_time=now, step=step, summary=Summary(value=[text])))
        density = values.get(_DENSITY)
        if isinstance(density, np.ndarray):
            self._axes = self._axes or axes_for(density)
            png = draw(density, self._axes, f"step {step}")
            image = Summary.Image(width=320, height=240, colorspace=4, encoded_image_string=png)
            picture = Summary.Value(tag=_DENSITY, image=image)
            self._add(Record(wall_time=now, step=step, summary=Summary(value=[picture])))

    def flush(self) -> None:
        """Write what waits; what a full disk refuses (OSError) waits on, whole."""
        while self._waiting:
            written = self._file.write(self._waiting)
            del self._waiting[:written]

    def close(self) -> None:
        """Flush, and close the file even if that fails. Closing twice is allowed."""
        try:
            self.flush()
        finally:
            self._file.close()
            self._waiting.clear()

    def _scalars(self, now: float, step: int, tagged: Mapping[str, float]) -> Record:
        """The step's values in one record, made anew only where the tags are new: three quarters
        of its time goes into them."""
        tags = tuple(tagged)
        kept = self._records.pop(tags, None)
        if kept is None:
            made = Record(summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))
            kept = made, tuple(made.summary.value)
        self._records[tags] = kept
        if len(self._records) > _MOST_RECORDS:
            del self._records[next(iter(self._records))]
        message, slots = kept
        message.wall_time, message.step = now, step
        for slot, value in zip(slots, tagged.values(), strict=True):
            slot.simple_value = value
        return message

    def _add(self, message: Record) -> None:
        self._waiting += record(message.SerializeToString())


def _tagged(values: Mapping[str, float | NDArray[Any]]) -> Mapping[str, float]:
    """What goes under which tag."""
    plain, estimates = _kinds(tuple(values))
    scalars = {n: v for n in plain if not isinstance(v := values[n], np.ndarray)}
    return scalars | dict(_of_estimates(estimates, values)) if estimates else scalars


def _of_estimates(names: Iterable[str], values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in names:
        numbers = {part: float(values.get(f"{name}.{part}", math.nan)) for part in _PARTS}
        value = float(values[name])
        if not (numbers["converged"] or numbers["provisional"]):
            yield f"{name}/not_converged", value
            continue
        yield name, value
        if name == EDGE_RATIO:
            yield EDGE, 1.0
        if name in _MARGINS:
            yield from zip(margins(name), _ends(value, numbers), strict=True)


_PARTS = ("error", "products", "converged", "provisional", "lower_bound", "upper_bound")


def _ends(value: float, numbers: Mapping[str, float]) -> Iterable[float]:
    """The lower and the upper end: a bound if there is one, else the error, else the value."""
    error = numbers["error"]
    reach = 0.0 if math.isnan(error) else error
    for bound, end in (("lower_bound", value - reach), ("upper_bound", value + reach)):
        yield end if math.isnan(numbers[bound]) else numbers[bound]


@lru_cache(maxsize=256)
def _kinds(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plain series, and the estimates, whose parts are series too."""
    known = set(names)
    estimates = [name for name in names if {f"{name}.converged", f"{name}.provisional"} <= known]
    parts = {f"{name}.{part}" for name in estimates for part in _PARTS}
    plain = [name for name in names if name not in parts and name not in estimates]
    return tuple(plain), tuple(estimates)


def markdown(event: Event) -> str:
    """The event as a table: what, when, how strong, how sure, and on what it rests."""
    when = f"from step {event.start}, strongest at {event.peak}, "
    when += "still open" if event.end is None else f"until {event.end}"
    lines = [
        ("what", event.kind.replace("_", " ")),
        ("when", when),
        ("severity", f"{event.severity:.4g}"),
        ("confidence", f"{event.confidence:.2f}"),
        ("series", ", ".join(event.series)),
    ]
    for name, value in event.details.items():
        lines.append((name, f"{value:.6g}" if isinstance(value, float) else str(value)))
    table = ["| | |", "| --- | --- |", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in lines)]
    return "\n".join(table)


def _cell(text: str) -> str:
    """Text that Markdown takes as it is."""
    line = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+!|~" else sign for sign in line)


def _text(tag: str, content: bytes) -> Summary.Value:
    return Summary.Value(tag=tag, tensor=TensorProto(dtype=DT_STRING, string_val=[content]))
