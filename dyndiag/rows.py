"""Measured values on their way from the device to the store."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dyndiag.state import Measurements
from dyndiag.values import Estimate

Row = tuple[int, dict[str, "float | np.ndarray"]]
_Part = tuple[tuple[str, ...], tuple["float | np.ndarray", ...]]

_CHUNK = 48
"""Values kept together: a tuple of more is no small object to Python, and comes from the memory
that the training's tensors come from. Held there for some steps it breaks that up, and on a CPU
the training may then have to ask the system for memory anew at every step."""


class Rows:
    """Values by step. What is on an accelerator stays there until `to_host`."""

    def __init__(self) -> None:
        self._rows: dict[int, list[_Part]] = {}
        self._waiting: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._arrays: list[tuple[int, str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, measurements: Measurements) -> None:
        """Keep values of a step; a later value of the same name replaces the earlier."""
        parts = self._rows.setdefault(step, [])
        row: dict[str, float | np.ndarray] = {}
        for name, value in measurements.items():
            names = (name,) if isinstance(name, str) else name
            if isinstance(value, list):
                _append(parts, names, tuple(value))
            elif isinstance(value, Estimate):
                row |= value.columns(names[0])
            elif isinstance(value, np.ndarray) and value.ndim > 0:
                row[names[0]] = value.copy()
            elif not isinstance(value, Tensor):
                row[names[0]] = float(value)
            elif isinstance(name, str) and value.dim() > 0:
                self._arrays.append((step, name, value.detach().clone()))
            elif not value.is_cpu:
                self._waiting.append((step, names, value.detach().clone()))
            elif len(names) == 1:  # nothing to wait for, and the user may overwrite it
                row[names[0]] = float(value.item())
            else:
                row.update(zip(names, value.detach().double().tolist(), strict=True))
        _append(parts, tuple(row), tuple(row.values()))

    def to_host(self) -> list[Row]:
        """All rows in step order, and forget them. One copy from each device, and one an array."""
        rows: dict[int, dict[str, float | np.ndarray]] = {
            step: {
                name: value
                for names, values in parts
                for name, value in zip(names, values, strict=True)
            }
            for step, parts in sorted(self._rows.items())
        }
        by_device: dict[torch.device, list[tuple[int, tuple[str, ...], Tensor]]] = {}
        for item in self._waiting:
            by_device.setdefault(item[2].device, []).append(item)
        for items in by_device.values():
            numbers = iter(torch.cat([value.reshape(-1).double() for *_, value in items]).tolist())
            for step, names, _ in items:
                rows[step].update({name: next(numbers) for name in names})
        for step, name, array in self._arrays:
            if array.dtype == torch.bfloat16:  # which NumPy does not have
                array = array.float()
            rows[step][name] = array.cpu().numpy()
        self._rows, self._waiting, self._arrays = {}, [], []
        return list(rows.items())


def _append(
    parts: list[_Part], names: tuple[str, ...], values: tuple[float | np.ndarray, ...]
) -> None:
    for first in range(0, len(names), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        parts.append((names[chunk], values[chunk]))
