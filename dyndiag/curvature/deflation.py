"""A matrix as a part that is known exactly and a rest that random probes are sent through."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from dyndiag.curvature.lanczos import ROUNDING, norms
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.readings import Readings, exact_dtype, square_of

_ROWS = 16
"""Rows of the basis that are allocated at once."""


class Deflation:
    """An orthonormal basis Q whose images A Q are paid for, and the rest B = ΠAΠ, Π = I − QQᵀ.

    tr A = tr(QᵀAQ) + tr B, and likewise for the diagonal and ‖A‖_F². Probes that were sent through
    A before the basis grew stay of use: A(z − q qᵀz) = Az − (qᵀz) Aq costs no product. They must
    not have had a part in the choice of the basis.

    Memory: a vector for each row of the basis, two for each probe kept. One sync a row.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self._blocks: list[Tensor] = []
        self.columns: list[list[float]] = []
        """Column j of QᵀAQ, down to its diagonal."""
        self.trace = self.square = 0.0
        """tr(QᵀAQ) and ‖AQ‖_F²."""
        self.remainder = math.inf
        """‖ΠAq‖ for the last row q."""
        self.finite = True
        self._scale = 0.0
        self._weighted = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.columns)

    def keep(self, z: Tensor) -> None:
        """Send a probe through the rest. One product, no sync."""
        self._kept.append((z, self.operator.product(self.project(z))))

    def readings(self) -> Readings:
        """Of the probes kept, against the basis as it is now."""
        found = Readings(self.operator)
        for z, image in self._kept:
            self._read(found, z, image)
        return found

    def holders(self, mean: float) -> float:
        """(Σ μ²)² / Σ μ⁴ over the eigenvalues μ = λ − mean, before the basis begins.

        From the images x = (A − mean) z of the probes kept: E‖x‖² = Σ μ² and, for two of them,
        E(xᵀx′)² = Σ μ⁴ up to the probes' own scatter.
        """
        images = [sent - mean * z for z, sent in self._kept]
        lengths = [norms(x) for x in images]
        typical = torch.stack(lengths).mean()
        # Of length about 1, or a float32 product of two entries could under- or overflow.
        unit = [x / typical.to(x.dtype) for x in images]
        squares = torch.stack([(length / typical) ** 2 for length in lengths])
        pairs = torch.stack([(x * y).sum(dtype=typical.dtype) for x, y in combinations(unit, 2)])
        return float(squares.mean() ** 2 / (pairs**2).mean())

    def send(self, z: Tensor, into: Readings) -> None:
        """Send a probe through the rest and read it at once. One product, no sync."""
        self._read(into, z, self.operator.product(self.project(z)))

    def forget(self) -> None:
        """Let go of the probes kept: the basis will not grow any more."""
        self._kept.clear()

    @property
    def exhausted(self) -> bool:
        """Nothing but rounding is left outside the basis of the last row's image."""
        return self.remainder <= ROUNDING * torch.finfo(self.operator.dtype).eps * self._scale

    def extend(self, vector: Tensor, spare: Tensor | None = None) -> Tensor:
        """One row q along Π · vector, or along `spare` where only rounding is left of that.

        Returns ΠAq, the direction that a Krylov basis goes on with. One product. `finite` is False
        if it held NaN or inf; the basis is then spoilt, and nothing else has changed.
        """
        q = self._unit(vector, spare)
        image = self.operator.product(q)
        self._append(q)
        rest, first = self._split(image)
        rest, second = self._split(rest)
        exact = exact_dtype(self.operator)
        told = torch.cat(
            (
                (first + second).to(exact),
                norms(rest).to(exact)[None],
                square_of(image)[None],
            )
        ).tolist()
        self.finite = all(map(math.isfinite, told))
        if not self.finite:
            return rest
        *column, self.remainder, square = told
        self.columns.append(column)
        self.trace += column[-1]
        self.square += square
        self._scale = max(self._scale, math.sqrt(square))
        self._weighted += q * image
        for z, sent in self._kept:
            sent.sub_((q @ z) * image)
        return rest

    def diagonal(self) -> Tensor:
        """(size,): the diagonal of A − B. Costs a pass over the basis for each of its rows."""
        found = 2 * self._weighted
        square = torch.zeros(len(self), len(self), dtype=torch.float64)
        for j, column in enumerate(self.columns):
            square[j, : j + 1] = square[: j + 1, j] = torch.tensor(column, dtype=torch.float64)
        for j, row in enumerate(square.to(found)):
            blocks = zip(row.split(_ROWS), self._blocks, strict=False)
            found -= self._row(j) * sum(c @ block[: len(c)] for c, block in blocks)
        return found

    def project(self, vector: Tensor) -> Tensor:
        """Π · vector: a new tensor."""
        return self._split(vector)[0] if self._blocks else vector.clone()

    def _unit(self, vector: Tensor, spare: Tensor | None) -> Tensor:
        """Projected twice: what rounding left of the first pass may be most of a small rest."""
        floor = ROUNDING * torch.finfo(vector.dtype).eps * norms(vector)
        vector = self.project(self.project(vector))
        if spare is not None:
            spare = self.project(self.project(spare))
            vector = torch.where(norms(vector) > floor, vector, spare)
        return vector / norms(vector).to(vector.dtype)

    def _read(self, into: Readings, z: Tensor, image: Tensor) -> None:
        square = square_of(image) + self.square
        into.add(z * self.project(image), square)

    def _split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The vector less its part in the basis, and its coefficients there."""
        coefficients = [block @ vector for block in self._blocks]  # rows not yet filled are zero
        for block, coefficient in zip(self._blocks, coefficients, strict=True):
            vector = torch.addmv(vector, block.T, coefficient, alpha=-1)
        return vector, torch.cat(coefficients)[: len(self) + 1]

    def _append(self, row: Tensor) -> None:
        if len(self) == _ROWS * len(self._blocks):
            self._blocks.append(row.new_zeros(_ROWS, len(row)))
        self._row(len(self)).copy_(row)

    def _row(self, i: int) -> Tensor:
        return self._blocks[i // _ROWS][i % _ROWS]
