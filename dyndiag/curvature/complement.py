"""How many eigenvalues can lie above a number, when some eigenpairs are known almost exactly.

Let V hold j orthonormal Ritz vectors with values Θ and residuals C = A V − V Θ, which are
orthogonal to V, and let P project on V's orthogonal complement. There A acts as B = P A P, and A is

    ( Θ   Cᵀ )
    ( C   B  ).

A Lanczos run with B, from a start that is Gaussian in the complement and was drawn after V, shows
that λ₁(B) < μ but for its risk (`certificate`). For x ≥ μ, Haynsworth's inertia additivity (1968,
Linear Algebra Appl. 1, 73–81) says that A has as many eigenvalues above x as Θ + Cᵀ (x − B)⁻¹ C
has, and (x − B)⁻¹ ≼ (x − μ)⁻¹. Hence **A has at most as many eigenvalues above x as the j × j
matrix Θ + CᵀC/(x − μ)**, but for the risk.

It costs less than a run with A, which has to find again what V knows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.certificate import Christoffel, excludes, reach
from dyndiag.curvature.lanczos import Floats, Lanczos, norms
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.subspace import Subspace

LITTLE_ROOM = 0.005
"""What known pairs may take of the certificate's reach, as a share of the value."""


class Complement:
    """Lanczos in the orthogonal complement of known vectors, and Rayleigh–Ritz on both together."""

    def __init__(
        self, operator: Operator, vectors: Tensor, values: Floats, residuals: Tensor, start: Tensor
    ) -> None:
        """`vectors` V and `residuals` C: (j, size); `values` Θ: (j,), descending. j may be 0.

        `start`: (size,), with a random part that is independent of V.
        """
        self._operator, self._vectors, self._known = operator, vectors, values
        self._gram = gram(residuals)
        self._couplings: list[Tensor] = []
        """V A q for each vector q of the run's basis."""
        inside = Operator(self._product, operator.size, operator.dtype, operator.device)
        self.run = Lanczos(inside, self._outside(self._outside(start)))

    def _product(self, v: Tensor) -> Tensor:
        image = self._operator.product(v)
        self._couplings.append(self._vectors @ image)
        return self._outside(image)

    def _outside(self, vector: Tensor) -> Tensor:
        return vector - (self._vectors @ vector) @ self._vectors

    @property
    def exhausted(self) -> bool:
        """Of the complement, the run has shown everything but copies of what it has shown."""
        return self.run.exhausted or len(self.run) >= self._operator.size - len(self._known)

    @property
    def rounding(self) -> float:
        """What rounding may hide in a Ritz value or residual."""
        return self.run.rounding(np.append(self._known, self.run.ritz()[0]))

    @property
    def largest(self) -> float:
        """The largest Ritz value of either space: no more than λ₁, but for rounding."""
        return float(np.append(self._known, self.run.ritz()[0]).max())

    def at_most(self, count: int, x: float, need: float) -> bool:
        """Whether, but for the risk behind `need`, at most `count` eigenvalues lie above x."""
        if self.blocked(count, x):
            return False
        if self.exhausted:
            return True
        return bool(
            excludes([Christoffel.of(self.run)], np.array([self._limit(count, x)]), need)[0]
        )

    def blocked(self, count: int, x: float) -> bool:
        """Whether the run has come upon an eigenvalue too near to x for `at_most` to hold."""
        return bool(self.run.ritz()[0][-1] > self._limit(count, x))

    def _limit(self, count: int, x: float) -> float:
        """What λ₁(B) must not exceed."""
        return x - room_below(x, count, self._known, self._gram) - self.rounding

    def upper_bound(self, need: float) -> float:
        """No eigenvalue lies above, but for the risk behind `need`. inf if the run is too short."""
        limit = reach([Christoffel.of(self.run)], need, 1)
        if self.exhausted:
            limit = float(self.run.ritz()[0][-1])
        if not math.isfinite(limit) or not len(self._known):
            return limit + self.rounding
        low, high = 0.0, 2 * (abs(limit) + float(np.abs(self._known).max() + self._gram.max()) + 1)
        for _ in range(100):
            middle = (low + high) / 2
            top = np.linalg.eigvalsh(np.diag(self._known) + self._gram / middle)[-1]
            low, high = (low, middle) if top <= limit + middle else (middle, high)
        return limit + high + self.rounding

    def pairs(self) -> tuple[Floats, Floats, Floats]:
        """Ritz values of both spaces together (m,), descending; residuals (m,); mixing (m, m).

        The residuals are upper bounds, but for rounding.
        """
        values, vectors = self.run.ritz()
        j = len(self._known)
        matrix = np.diag(np.append(self._known, values))
        couplings = np.zeros((j, len(values)))
        if j:
            couplings = np.array(torch.stack(self._couplings).tolist()).T[:, : len(values)]
            matrix[:j, j:] = couplings @ vectors
            matrix[j:, :j] = matrix[:j, j:].T
        found, mixing = np.linalg.eigh(matrix)
        found, mixing = found[::-1], mixing[:, ::-1]
        # A y = θ y + the parts of C that lie outside of the run's basis + the run's own remainder.
        outside = self._gram - couplings @ couplings.T
        known, inside = mixing[:j], vectors @ mixing[j:]
        left = np.sqrt(np.maximum(np.einsum("im,ik,km->m", known, outside, known), 0.0))
        own = 0.0 if self.run.exhausted else self.run.couplings[-1] * np.abs(inside[-1])
        return found, left + own, np.vstack((known, inside))

    def combined(self, mixing: Floats) -> Tensor:
        """Vectors of `pairs`, (count, size), from columns of its mixing."""
        j = len(self._known)
        found = self.run.combine(torch.from_numpy(mixing[j:].T.copy()))
        if j:
            found = found + torch.from_numpy(mixing[:j].T.copy()).to(found) @ self._vectors
        return found / norms(found)[:, None].to(found.dtype)


def room_below(x: float, count: int, values: Floats, gram: Floats) -> float:
    """The least d with at most `count` eigenvalues of diag(values) + gram/d above x; inf if none.

    The run with B then has to exclude what lies above x − d.
    """
    if len(values) <= count or not gram.any():
        return 0.0 if len(values) <= count or values[count] <= x else math.inf
    if values[count] >= x:
        return math.inf
    low, high = 0.0, float(np.trace(gram)) / (x - float(values[count]))  # enough, by Weyl
    for _ in range(40):
        middle = (low + high) / 2
        fits = np.linalg.eigvalsh(np.diag(values) + gram / middle)[-1 - count] <= x
        low, high = (low, middle) if fits else (middle, high)
    return high


def gram(residuals: Tensor) -> Floats:
    """Inner products (j, j) of residuals (j, size)."""
    if not len(residuals):
        return np.empty((0, 0))
    lengths = norms(residuals)
    # Powers of two: products of small or large entries could leave the range of float32.
    scales = torch.exp2(torch.frexp(lengths).exponent.to(lengths.dtype))
    units = zip(residuals, scales.to(residuals.dtype), strict=True)
    rows = torch.stack([residuals @ (r / scale) for r, scale in units])
    products = np.array((rows.to(scales.dtype) * scales[:, None]).tolist())
    return (products + products.T) / 2


def usable(subspace: Subspace, most: int, count: int, x: float, room: float = LITTLE_ROOM) -> int:
    """How many of the largest Ritz pairs a certificate at x should take as known."""
    most = min(most, len(subspace.values))
    residuals = gram(subspace.residuals(0, most)[0])
    for known in range(most, count, -1):
        values = subspace.values[:known]
        if room_below(x, count, values, residuals[:known, :known]) <= room * abs(x):
            return known
    return min(count, most)


def complement_of(
    operator: Operator, subspace: Subspace | None, known: int, start: Tensor
) -> Complement:
    if subspace is None or known == 0:
        nothing = start.new_empty(0, operator.size)
        return Complement(operator, nothing, np.empty(0), nothing, start)
    vectors, residuals = subspace.vectors(known), subspace.residuals(0, known)[0]
    return Complement(operator, vectors, subspace.values[:known].copy(), residuals, start)
