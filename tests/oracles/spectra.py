"""Operators whose eigenvalues are known, friendly and hostile, and what watches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature import Operator

_SMALL_BULK = np.linspace(0, 1, 118)

SPECTRA: dict[str, np.ndarray] = {
    "pair 4.9/5.0 over a bulk": np.r_[_SMALL_BULK, 4.9, 5.0],
    "ten outliers 4.1 to 5": np.r_[_SMALL_BULK[:110], np.linspace(4.1, 5, 10)],
    "flat bulk": np.linspace(0.9, 1.1, 120),
    "indefinite": np.r_[np.linspace(-5, 1, 119), 5.0],
    "saddle": np.r_[-3.0, np.linspace(-0.2, 0.2, 118), 3.0],
    "cluster": np.r_[_SMALL_BULK[:115], 4.96, 4.97, 4.98, 4.99, 5.0],
    "negative definite": np.linspace(-7, -1, 120),
    "low rank": np.r_[np.zeros(116), -2.0, 1.0, 3.0, 6.0],
    "power law": np.arange(1, 121) ** -2.0,
}


def matrix_with(spectrum: Sequence[float] | np.ndarray, seed: int = 0) -> Tensor:
    """A dense float64 symmetric matrix with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    directions = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix = (
        directions * torch.as_tensor(np.asarray(spectrum), dtype=torch.float64)
    ) @ directions.T
    return (matrix + matrix.T) / 2


def of_matrix(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Operator:
    held = matrix.to(dtype)
    return Operator(lambda v: held @ v, len(held), dtype, held.device)


def of_diagonal(
    spectrum: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float64
) -> Operator:
    """Already diagonal: cheap, and no restriction, since random starts know no direction."""
    held = torch.as_tensor(np.asarray(spectrum), dtype=dtype)
    return Operator(lambda v: held * v, len(held), dtype, held.device)


def dense(operator: Operator) -> Tensor:
    """The operator's matrix, column by column."""
    unit = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.product(e) for e in unit], dim=1)


def counted(operator: Operator) -> tuple[Operator, list[Tensor]]:
    """The operator, and a list that grows by one entry at every product."""
    calls: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return operator.product(v)

    return replace(operator, product=product), calls


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
