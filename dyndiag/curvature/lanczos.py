"""The Lanczos recurrence. Eigenpairs and density are readings of the tridiagonal matrix it builds.

The core decides nothing: no tolerance, no choice of k, no stop.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndiag.curvature.operator import Operator

Floats = NDArray[np.float64]

ROUNDING = 64.0
"""Rounding of a product and its reorthogonalisation, in units of eps · ‖A‖ as far as it is known.

In float32, converged pairs of small networks (1,500 to 350,000 parameters) had ‖Av − λv‖ of 4 to
20 such units, recomputed, where the recurrence said zero.
"""


_ROWS = 16
"""Rows of the basis that are allocated at once."""


class Lanczos:
    """A Qᵀ = Qᵀ T + r eₘᵀ after m products, one product at a time.

    Q (m, size) has orthonormal rows, T is symmetric tridiagonal, ‖r‖ is `couplings[-1]`. The basis
    lives on the operator's device, in its dtype, in blocks of a few rows that are added as it
    grows; the coefficients are float64 on the CPU. One host–device sync a product.

    Every new vector is reorthogonalised against all earlier ones, twice, each pass two matrix
    products a block: twice is enough (Giraud, Langou & Rozložník 2005). Without it, converged
    eigenvalues come back as ghost copies.
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        """`start`: (size,), finite and not zero."""
        self._operator = operator
        self._blocks: list[Tensor] = []
        self._append(start / norms(start).to(operator.dtype), 0)
        self.diagonal: list[float] = []
        self.couplings: list[float] = []
        """Off-diagonal of T, then ‖r‖: as long as `diagonal`."""
        self.segment = 0
        """Where the last start vector stands in the basis; 0 unless the space was exhausted."""
        self.products = 0
        self.finite = True
        self._scale = 0.0

    @property
    def complete(self) -> bool:
        """The basis spans the whole space."""
        return len(self.diagonal) == self._operator.size

    @property
    def exhausted(self) -> bool:
        """The Krylov space is invariant up to rounding: no further product tells anything new."""
        eps = torch.finfo(self._operator.dtype).eps
        return self.complete or self.couplings[-1] <= ROUNDING * eps * self._scale

    def extend(self) -> None:
        """One product. Sets `finite` to False, and changes nothing else, if it held NaN or inf."""
        m = len(self.diagonal)
        image = self._operator.product(self._blocks[-1][m % _ROWS])
        image, first = self._project(image, m + 1)
        image, second = self._project(image, m + 1)
        remainder = norms(image)
        coefficient = (first + second).to(remainder.dtype)
        alpha, beta = torch.stack((coefficient, remainder)).tolist()  # the step's one sync
        self.products += 1
        self.finite = math.isfinite(alpha) and math.isfinite(beta)
        if self.finite:
            self.diagonal.append(alpha)
            self.couplings.append(beta)
            self._scale = max(self._scale, abs(alpha), beta)
            if not self.exhausted:
                self._append(image / beta, m + 1)

    def restart(self, vector: Tensor) -> None:
        """Go on in the orthogonal complement of an exhausted space, from `vector` (size,)."""
        m = len(self.diagonal)
        for _ in range(2):
            vector, _ = self._project(vector, m)
        self._append(vector / norms(vector).to(vector.dtype), m)
        self.couplings[-1] = 0.0
        self.segment = m

    def combine(self, coefficients: Tensor) -> Tensor:
        """Combinations of the basis: (k, m) → (k, size)."""
        parts = coefficients.to(self._blocks[0]).split(_ROWS, dim=1)
        return sum(
            (
                part @ rows
                for part, rows in zip(parts, self._filled(len(self.diagonal)), strict=True)
            ),
            start=torch.zeros((), device=self._operator.device),
        )

    def _append(self, row: Tensor, m: int) -> None:
        if m % _ROWS == 0:
            self._blocks.append(row.new_empty(min(_ROWS, self._operator.size), len(row)))
        self._blocks[-1][m % _ROWS] = row

    def _filled(self, m: int) -> list[Tensor]:
        """The first m rows, block by block."""
        return [block[: m - _ROWS * i] for i, block in enumerate(self._blocks) if m > _ROWS * i]

    def _project(self, vector: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """The vector less its part in the first m rows, and its coefficient on the last of them."""
        rows = self._filled(m)
        coefficients = [block @ vector for block in rows]
        for block, coefficient in zip(rows, coefficients, strict=True):
            vector = vector - coefficient @ block
        return vector, coefficients[-1][-1]

    def ritz(self, first: int = 0) -> tuple[Floats, Floats]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), columns, of T[first:, first:]."""
        off = np.asarray(self.couplings[first:-1])
        tridiagonal = np.diag(self.diagonal[first:]) + np.diag(off, 1) + np.diag(off, -1)
        values, vectors = np.linalg.eigh(tridiagonal)
        return values, vectors

    def rounding(self, values: Floats) -> float:
        """What rounding may hide in a Ritz value or residual, given all Ritz values."""
        # Early Ritz values may be small by chance where the coefficients are not.
        size = max(self._scale, float(np.abs(values).max()))
        return ROUNDING * torch.finfo(self._operator.dtype).eps * size


def norms(vectors: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, summed in float64.

    Summed in float32, the norm of 670,000 entries is off by 7e-6: sixty times eps.
    """
    exact = vectors.dtype if vectors.device.type == "mps" else torch.float64  # MPS has no float64
    found: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=exact)
    return found
