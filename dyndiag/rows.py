"""Measured values on their way from the device to the store."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dyndiag.state import Measurements
from dyndiag.values import Estimate

Row = tuple[int, dict[str, "float | np.ndarray"]]


class Rows:
    """Values by step. What is on an accelerator stays there until `to_host`."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float | np.ndarray]] = {}
        self._waiting: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._arrays: list[tuple[int, str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, measurements: Measurements) -> None:
        """Keep values of a step; a later value of the same name replaces the earlier."""
        row = self._rows.setdefault(step, {})
        for name, value in measurements.items():
            if isinstance(value, Estimate):
                assert isinstance(name, str)
                row |= value.columns(name)
            elif isinstance(value, np.ndarray) and value.ndim > 0:
                assert isinstance(name, str)
                row[name] = value.copy()
            elif not isinstance(value, Tensor):
                assert isinstance(name, str)
                row[name] = float(value)
            elif isinstance(name, str) and value.dim() > 0:
                self._arrays.append((step, name, value.detach().clone()))
            else:
                self._add_tensor(step, (name,) if isinstance(name, str) else name, value.detach())

    def _add_tensor(self, step: int, names: tuple[str, ...], value: Tensor) -> None:
        if value.device.type == "cpu":  # nothing to wait for, and the user may overwrite it
            if len(names) == 1:
                self._rows[step][names[0]] = float(value)
            else:
                self._rows[step].update(zip(names, value.double().tolist(), strict=True))
        else:
            self._waiting.append((step, names, value.clone()))

    def to_host(self) -> list[Row]:
        """All rows in step order, and forget them. One copy from each device, and one an array."""
        by_device: dict[torch.device, list[tuple[int, tuple[str, ...], Tensor]]] = {}
        for item in self._waiting:
            by_device.setdefault(item[2].device, []).append(item)
        for items in by_device.values():
            numbers = iter(torch.cat([value.reshape(-1).double() for *_, value in items]).tolist())
            for step, names, _ in items:
                self._rows[step].update({name: next(numbers) for name in names})
        for step, name, array in self._arrays:
            if array.dtype == torch.bfloat16:  # which NumPy does not have
                array = array.float()
            self._rows[step][name] = array.cpu().numpy()
        rows = sorted(self._rows.items())
        self._rows, self._waiting, self._arrays = {}, [], []
        return rows
