"""How values, events, arrays and metadata are spelled in the file, and read back as themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dyndiag.errors import DyndiagError
from dyndiag.values import Event

Cell: TypeAlias = float | str
"""A REAL, or the text 'nan': SQLite would turn a NaN into NULL, which means "not measured".
`float(cell)` is the value again, for ±inf and −0.0 too."""


def cell(value: float) -> Cell:
    """
    >>> cell(float("nan")), cell(-0.0)
    ('nan', -0.0)
    """
    number = float(value)
    return number if number == number else "nan"


def scalar_cells(values: Iterable[float]) -> list[Cell]:
    """`cell` of each; a call for each would take several times as long.

    >>> scalar_cells([1, float("inf"), float("-inf")]), scalar_cells([2.0, float("nan")])
    ([1.0, inf, -inf], [2.0, 'nan'])
    """
    numbers: list[Cell] = list(map(float, values))
    return [number if number == number else "nan" for number in numbers]


def to_json(value: object) -> str:
    """Strict JSON; NumPy scalars become numbers, what is not finite `{"float": "nan"}`.

    >>> to_json({"share": 0.05, "best": float("-inf")})
    '{"share": 0.05, "best": {"float": "-inf"}}'
    """
    try:
        return json.dumps(_plain(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DyndiagError(
            f"Metadata and event details must be JSON (numbers, texts, lists, dicts): {error}."
        ) from error


def from_json(text: str) -> Any:
    """
    >>> from_json('{"share": 0.05, "best": {"float": "-inf"}}')
    {'share': 0.05, 'best': -inf}
    """
    return json.loads(text, object_hook=_unplain)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _unplain(value: dict[str, Any]) -> Any:
    if len(value) == 1 and value.get("float") in ("nan", "inf", "-inf"):
        return float(value["float"])
    return value


def event_cells(event: Event) -> tuple[object, ...]:
    """The event as a row of table `events`."""
    return (
        event.kind,
        int(event.start),
        int(event.peak),
        None if event.end is None else int(event.end),
        cell(event.severity),
        cell(event.confidence),
        to_json(event.series),
        to_json(event.details),
    )


def event_from(cells: tuple[Any, ...]) -> Event:
    kind, start, peak, end, severity, confidence, series, details = cells
    return Event(
        kind=kind,
        start=start,
        peak=peak,
        end=end,
        severity=float(severity),
        confidence=float(confidence),
        series=tuple(from_json(series)),
        details=from_json(details),
    )


def array_cells(name: str, step: int, array: NDArray[Any]) -> tuple[object, ...]:
    """The array as a row of table `arrays`: numbers and booleans of any shape."""
    if array.dtype.kind not in "biufc":
        raise DyndiagError(f"{name} must be an array of numbers; one of {array.dtype} came.")
    return name, step, array.dtype.str, json.dumps(array.shape), array.tobytes()


def array_from(dtype: str, shape: str, data: bytes) -> NDArray[Any]:
    return np.frombuffer(data, np.dtype(dtype)).reshape(json.loads(shape)).copy()
