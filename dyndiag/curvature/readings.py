"""What random probes say of a matrix: its trace and its blocks', its diagonal, its norm."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.lanczos import Floats, norms
from dyndiag.curvature.operator import Operator


class Readings:
    """Running sums over probes. Each adds d, (size,), whose mean is the diagonal.

    With a probe z of ±1 and d = z ∘ Bz, Var(zᵀBz) = 2(‖B‖_F² − Σ Bᵢᵢ²), which is twice the summed
    variances of the entries of d: the scatter of `size` entries tells it far more surely than that
    of a few sums. Memory: one vector. Nothing here waits for the device.
    """

    def __init__(self, operator: Operator) -> None:
        self._parts = list(operator.parts.values())
        self._exact = exact_dtype(operator)
        self.diagonal = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        """(size,): the mean of d."""
        self._scatter = torch.zeros((), dtype=self._exact, device=operator.device)
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, d: Tensor, square: Tensor) -> None:
        """`square`: 0-d, this probe's estimate of ‖A‖_F²."""
        change, before = d - self.diagonal, len(self)
        self.diagonal += change / (before + 1)
        self._scatter += before / (before + 1) * square_of(change)
        sums = [total(d[part], self._exact) for part in self._parts]
        self._rows.append(torch.stack([total(d, self._exact), square.to(self._exact), *sums]))

    def numbers(self) -> tuple[Floats, float]:
        """The one sync. (probes, 2 + parts): trace, square and parts of each; variance of a trace.

        The variance is NaN from a single probe, and everything is once a product held NaN or inf.
        """
        rows = torch.stack(self._rows)
        flat = torch.cat((rows.flatten(), self._scatter[None])).tolist()
        table = np.reshape(flat[:-1], tuple(rows.shape))
        if not np.isfinite(flat).all():
            return np.full_like(table, np.nan), math.nan
        return table, 2 * flat[-1] / (len(self) - 1) if len(self) > 1 else math.nan


def square_of(vector: Tensor) -> Tensor:
    """‖vector‖², 0-d. Squares of entries below 1e-23 or above 1e19 do not fit into float32."""
    return norms(vector) ** 2


def total(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Their sum, accumulated in `dtype`."""
    return values.sum(dtype=dtype)


def exact_dtype(operator: Operator) -> torch.dtype:
    """Float64, but where the device has none."""
    return torch.float32 if operator.device.type == "mps" else torch.float64
