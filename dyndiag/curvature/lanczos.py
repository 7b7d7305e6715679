"""The Lanczos recurrence. Eigenpairs and density are readings of the tridiagonal matrix it builds.

The core decides nothing: no tolerance, no choice of k, no stop.
"""

from __future__ import annotations

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


class Lanczos:
    """A Qᵀ = Qᵀ T + r eₘᵀ after m products, one product at a time.

    Q (m, size) has orthonormal rows, T is symmetric tridiagonal, ‖r‖ is `couplings[-1]`. The basis
    lives in one block of `capacity` · size numbers on the operator's device, in its dtype; the
    coefficients are float64 on the CPU. One host–device sync a product.

    Every new vector is reorthogonalised against all earlier ones, twice, each pass two matrix
    products: twice is enough (Giraud, Langou & Rozložník 2005). Without it, converged eigenvalues
    come back as ghost copies.
    """

    def __init__(self, operator: Operator, start: Tensor, capacity: int) -> None:
        """`start`: (size,), finite and not zero. `capacity`: the most products, ≤ size."""
        self._operator = operator
        self._block = torch.empty(
            capacity, operator.size, dtype=operator.dtype, device=operator.device
        )
        torch.div(start, norms(start).to(operator.dtype), out=self._block[0])
        self.diagonal: list[float] = []
        self.couplings: list[float] = []
        """Off-diagonal of T, then ‖r‖: as long as `diagonal`."""
        self.segment = 0
        """Where the last start vector stands in the basis; 0 unless the space was exhausted."""
        self.products = 0
        self.finite = True
        self._scale = 0.0

    @property
    def basis(self) -> Tensor:
        """Q, (m, size): a view of the block."""
        return self._block[: len(self.diagonal)]

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
        basis = self._block[: m + 1]
        image = self._operator.product(basis[m])
        first = basis @ image
        image = image - first @ basis
        second = basis @ image
        image = image - second @ basis
        remainder = norms(image)
        if m + 1 < len(self._block):  # 0/0 where exhausted: never read, `restart` overwrites it
            torch.div(image, remainder.to(image.dtype), out=self._block[m + 1])
        coefficient = (first[m] + second[m]).to(remainder.dtype)
        alpha, beta = torch.stack((coefficient, remainder)).tolist()  # the step's one sync
        self.products += 1
        self.finite = bool(np.isfinite(alpha) and np.isfinite(beta))
        if self.finite:
            self.diagonal.append(alpha)
            self.couplings.append(beta)
            self._scale = max(self._scale, abs(alpha), beta)

    def restart(self, vector: Tensor) -> None:
        """Go on in the orthogonal complement of an exhausted space, from `vector` (size,)."""
        m = len(self.diagonal)
        for _ in range(2):
            vector = vector - (self.basis @ vector) @ self.basis
        torch.div(vector, norms(vector).to(vector.dtype), out=self._block[m])
        self.couplings[-1] = 0.0
        self.segment = m

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
