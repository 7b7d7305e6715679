"""The Lanczos recurrence. Eigenpairs and density are readings of the small matrix it builds.

The core decides nothing: no tolerance, no choice of k, no stop, no restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

_COLUMNS = 1 << 16
"""Columns that a change of basis takes at once: its copy is as many numbers a row."""

_SUM = 1 << 14
"""Terms that a dot product on the CPU sums in the basis's own dtype."""

_PIECE = 1 << 18
"""Entries whose norm is taken at once on a CPU: of 20 million, in an eighth of the time."""

_MATMULS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    getattr(torch.backends.mkldnn, "matmul", None),
)


class Lanczos:
    """A Qᵀ = Qᵀ T + r eₘᵀ, one product at a time.

    Q (m, size) has orthonormal rows, ‖r‖ is `couplings[-1]`. Without a restart, T is symmetric
    tridiagonal and m counts the products; after `compress`, T is an arrow of Ritz values that a
    tridiagonal matrix goes on from. The basis lives on the operator's device, in its dtype, in
    blocks of a few rows that are added as it grows; the coefficients are float64 on the CPU. One
    host–device sync a product.

    Every new vector is orthogonalised twice, which is enough (Giraud, Langou & Rozložník 2005):
    against the two rows that the recurrence couples it to, and then, when rounding alone is left
    of the others, against all of them, in two matrix products a block. Without the second pass
    converged eigenvalues come back as ghost copies.
    """

    def __init__(self, operator: Operator, start: Tensor, max_basis: int | None = None) -> None:
        """`start`: (size,), finite and not zero. `max_basis`: rows to allocate at most, one more
        than products without a restart."""
        self._operator = operator
        self._most_rows = min(operator.size + 1, max_basis or operator.size + 1)
        self._blocks: list[Tensor] = []
        self._place(start / norms(start).to(operator.dtype), 0)
        self.diagonal: list[float] = []
        """Of T, since the last restart of either kind."""
        self.couplings: list[float] = []
        """Off-diagonal of T, then ‖r‖: as long as `diagonal`."""
        self.segment = 0
        """Rows of the basis before the last start vector; 0 unless the space was exhausted."""
        self.discarded: list[float] = []
        """Ritz values that `compress` dropped since the last start vector."""
        self.log_couplings = 0.0
        """Σ log ‖r‖ over the products since the last start vector: −∞ where one was 0."""
        self.products = 0
        self.finite = True
        self._closed: tuple[Floats, Floats] = (np.empty(0), np.empty((0, 0)))
        self._kept: tuple[Floats, Floats] = (np.empty(0), np.empty(0))
        self._scale = 0.0
        self._ritz: tuple[Floats, Floats] | None = None

    def __len__(self) -> int:
        """m, the rows of the basis that T knows."""
        return self.segment + len(self._kept[0]) + len(self.diagonal)

    @property
    def complete(self) -> bool:
        """The basis spans the whole space."""
        return len(self) == self._operator.size

    @property
    def exhausted(self) -> bool:
        """The Krylov space is invariant up to rounding: no further product tells anything new."""
        eps = torch.finfo(self._operator.dtype).eps
        return self.complete or self.couplings[-1] <= ROUNDING * eps * self._scale

    def extend(self) -> None:
        """One product. Sets `finite` to False, and changes nothing else, if it held NaN or inf."""
        m = len(self)
        image = self._place(self._operator.product(self._row(m)), m + 1)
        coefficient = self._subtract_coupled(image, m) + self._project(image, m + 1)
        remainder = norms(image)
        coefficients = torch.stack((coefficient.to(remainder.dtype), remainder))
        alpha, beta = coefficients.tolist()  # the step's one sync
        self.products += 1
        self.finite = math.isfinite(alpha) and math.isfinite(beta)
        if self.finite:
            self.diagonal.append(alpha)
            self.couplings.append(beta)
            self.log_couplings += math.log(beta) if beta > 0 else -math.inf
            self._scale = max(self._scale, abs(alpha), beta)
            self._ritz = None
            if beta > 0:
                image /= beta

    def restart(self, vector: Tensor) -> None:
        """Go on in the orthogonal complement of an exhausted space, from `vector` (size,)."""
        m = len(self)
        vector = self._place(vector, m)
        for _ in range(2):
            self._project(vector, m)
        vector /= norms(vector).to(vector.dtype)
        self._closed = self.ritz()
        self._begin(m, np.empty(0), np.empty(0))
        self.discarded, self.log_couplings = [], 0.0

    def compress(self, kept: NDArray[np.intp]) -> None:
        """A thick restart: go on from some of the Ritz vectors, `kept` of `ritz()`, and r.

        Costs no product; reads the basis once and writes len(kept) rows of it, in place (Wu &
        Simon 2000, SIAM J. Matrix Anal. Appl. 22, 602–616). With A yᵢ = θᵢ yᵢ + sᵢ q, q = r/‖r‖,
        the next product is A q = Σ sᵢ yᵢ + α q + β q′, and from there on three terms do again.
        """
        m, exhausted = len(self), self.exhausted
        values, vectors = self.ritz()
        own = np.abs(vectors[self.segment :]).max(axis=0) > 0
        closed, going_on = kept[~own[kept]], kept[own[kept]]
        order = np.concatenate((closed, going_on))
        self._rotate(vectors[:, order].T, m)
        if not exhausted:
            self._place(self._row(m), len(order))
        dropped = own & ~np.isin(np.arange(m), kept)
        self.discarded.extend(values[dropped])
        self._closed = values[closed], np.eye(len(closed))
        self._begin(len(closed), values[going_on], self.couplings[-1] * vectors[-1, going_on])

    def combine(self, coefficients: Tensor) -> Tensor:
        """Combinations of the basis: (k, m) → (k, size)."""
        rows = self._filled(len(self))
        parts = coefficients.to(rows[0]).split(_ROWS, dim=1)
        total = rows[0].new_zeros(len(coefficients), rows[0].shape[1])
        with _full_precision():
            for part, block in zip(parts, rows, strict=True):
                total.addmm_(part, block)
        return total

    def ritz(self) -> tuple[Floats, Floats]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), columns, of T."""
        own_values, own_vectors = self.segment_ritz()
        if not self.segment:
            return own_values, own_vectors
        values = np.concatenate((self._closed[0], own_values))
        vectors = np.zeros((len(values), len(values)))
        vectors[: self.segment, : self.segment] = self._closed[1]
        vectors[self.segment :, self.segment :] = own_vectors
        order = np.argsort(values, kind="stable")
        return values[order], vectors[:, order]

    def segment_ritz(self) -> tuple[Floats, Floats]:
        """`ritz` of the rows since the last start vector alone."""
        if self._ritz is None:
            kept, arms = self._kept
            matrix = np.diag(np.concatenate((kept, self.diagonal)))
            n = len(kept)
            if self.diagonal:
                matrix[n, :n] = matrix[:n, n] = arms
                off = self.couplings[:-1]
                matrix[n:, n:] += np.diag(off, 1) + np.diag(off, -1)
            self._ritz = np.linalg.eigh(matrix)
        return self._ritz

    def segment_arms(self) -> Floats:
        """(m,): A y = θ y + s q for each pair of `segment_ritz`, q = r/‖r‖. |s| is its residual."""
        _, vectors = self.segment_ritz()
        return self.couplings[-1] * vectors[-1] if self.couplings else self._kept[1]

    def residuals(self) -> Floats:
        """‖A y − θ y‖ of each pair of `ritz`, (m,), by the recurrence: add the rounding."""
        arms = np.abs(self.segment_arms())
        if not self.segment:
            return arms
        values = np.concatenate((self._closed[0], self.segment_ritz()[0]))
        both = np.concatenate((np.zeros(self.segment), arms))
        return both[np.argsort(values, kind="stable")]

    def rounding(self, values: Floats) -> float:
        """What rounding may hide in a Ritz value or residual, given all Ritz values."""
        # Early Ritz values may be small by chance where the coefficients are not.
        size = max(self._scale, float(np.abs(values).max()))
        return ROUNDING * torch.finfo(self._operator.dtype).eps * size

    def _begin(self, segment: int, kept: Floats, arms: Floats) -> None:
        self.segment, self._kept = segment, (kept, arms)
        self.diagonal, self.couplings, self._ritz = [], [], None

    def _row(self, i: int) -> Tensor:
        return self._blocks[i // _ROWS][i % _ROWS]

    def _place(self, vector: Tensor, i: int) -> Tensor:
        """Row i, now a copy of the vector."""
        if i == _ROWS * len(self._blocks):
            self._blocks.append(vector.new_empty(min(_ROWS, self._most_rows - i), len(vector)))
        return self._row(i).copy_(vector)

    def _filled(self, m: int) -> list[Tensor]:
        """The first m rows, block by block."""
        return [block[: m - _ROWS * i] for i, block in enumerate(self._blocks) if m > _ROWS * i]

    def _subtract_coupled(self, image: Tensor, m: int) -> Tensor:
        """Take out of A qₘ its parts in the rows that T couples it to: qₘ's coefficient."""
        if not self.diagonal and len(self._kept[0]):  # after a restart, to all that was kept
            return self._project(image, m + 1)
        if self.diagonal:
            image.sub_(self._row(m - 1), alpha=self.couplings[-1])
        coefficient = torch.dot(self._row(m), image)
        image.addcmul_(self._row(m), coefficient, value=-1)
        return coefficient

    def _project(self, vector: Tensor, m: int) -> Tensor:
        """Take the vector's part in the first m rows out of it: the last row's coefficient."""
        rows = self._filled(m)
        with _full_precision():
            coefficients = [_dots(block, vector) for block in rows]
            for block, coefficient in zip(rows, coefficients, strict=True):
                vector.addmv_(block.T, coefficient.to(vector.dtype), alpha=-1)
        return coefficients[-1][-1]

    def _rotate(self, mixing: Floats, m: int) -> None:
        """The first rows become `mixing` (l, m) times the first m."""
        rows = self._filled(m)
        factor = torch.from_numpy(np.ascontiguousarray(mixing)).to(rows[0])
        with _full_precision():
            for first in range(0, rows[0].shape[1], _COLUMNS):
                columns = slice(first, first + _COLUMNS)
                images = factor @ torch.cat([block[:, columns] for block in rows])
                for block, image in zip(rows, images.split(_ROWS), strict=False):
                    block[: len(image), columns] = image


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in float32 where the training allows itself TF32 or bfloat16 for them."""
    full: str | bool
    settings, name, full = _MATMULS, "fp32_precision", "ieee"
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        settings, name, full = _MATMULS[:1], "allow_tf32", False
    before = [getattr(setting, name) for setting in settings]
    for setting in settings:
        setattr(setting, name, full)
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setattr(setting, name, value)


def _dots(rows: Tensor, vector: Tensor) -> Tensor:
    """rows @ vector, in short sums on the CPU.

    There a float32 product of 300,000 columns, of which one holds most, is off by 500 eps.
    """
    if rows.device.type != "cpu":
        return rows @ vector
    parts = zip(rows.split(_SUM, dim=1), vector.split(_SUM), strict=True)
    return torch.stack([part @ piece for part, piece in parts]).sum(dim=0, dtype=torch.float64)


def norms(vectors: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, summed in float64.

    Summed in float32, the norm of 670,000 entries is off by 7e-6: sixty times eps. On a CPU piece
    by piece, where the whole would be copied to float64 first.
    """
    exact = vectors.dtype if vectors.device.type == "mps" else torch.float64  # MPS has no float64
    pieces = vectors.split(_PIECE, dim=-1) if vectors.is_cpu else (vectors,)
    found = [torch.linalg.vector_norm(piece, dim=-1, dtype=exact) for piece in pieces]
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found), dim=0)
