"""XTrace: every test vector is a probe of what the others leave."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.lanczos import ROUNDING, norms
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.readings import Readings, exact_dtype, square_of

WIDENING = 1.3
"""The scatter of estimates that share their products is 10 to 25 % too small."""


class XTrace:
    """Leave-one-out estimates from k Gaussian test vectors ωᵢ and 2k products.

    With Q an orthonormal basis of AΩ, leaving ωᵢ out leaves the basis Q(I − sᵢsᵢᵀ), sᵢ ∝ R⁻ᵀeᵢ: no
    basis is built twice, and nothing is subtracted that has become large. ωᵢ, independent of it,
    probes the rest, scaled to its mean length there: exact on a multiple of the identity. Exact at
    rank ≤ k − 1. Source: Epperly, Tropp & Webber (2024), SIAM J. Matrix Anal. Appl. 45, 1–23,
    section 2.

    Memory: three vectors for each test vector, and two more while it is read: 2.5 a product.
    """

    def __init__(self, operator: Operator, generator: torch.Generator) -> None:
        self._operator = operator
        self._generator = generator
        self._vectors: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._images: list[Tensor] = []
        self._columns: list[Tensor] = []
        """R, column by column, on the device."""

    def __len__(self) -> int:
        return len(self._vectors)

    def extend(self) -> None:
        """One more test vector: two products."""
        omega = gaussian(self._operator, self._generator)
        y = self._operator.product(omega)
        q, column = self._orthogonal(y)
        floor = ROUNDING * torch.finfo(y.dtype).eps * norms(column)
        # Nothing of y is new where A has a low rank: any direction does.
        spare, _ = self._orthogonal(gaussian(self._operator, self._generator))
        new = column[-1] > floor
        spare, _ = self._orthogonal(torch.where(new, q, spare))
        q = torch.where(new, q, spare)
        self._vectors.append(omega)
        self._columns.append(column)
        self._basis.append(q)
        self._images.append(self._operator.product(q))

    def readings(self) -> Readings:
        """A row for each test vector. About 6 k² passes over a vector."""
        k, n = len(self), self._operator.size
        exact = exact_dtype(self._operator)
        r = torch.zeros(k, k, dtype=exact, device=self._operator.device)
        for j, column in enumerate(self._columns):
            r[: j + 1, j] = column.to(exact)
        largest = r.abs().max()
        floor = torch.finfo(exact).eps * torch.where(largest > 0, largest, 1.0)
        regular = r.clone()
        regular.diagonal().clamp_(min=floor)
        eye = torch.eye(k, dtype=exact, device=r.device)
        left_out = torch.linalg.solve_triangular(regular.T, eye, upper=False)
        left_out = left_out / torch.linalg.vector_norm(left_out, dim=0)

        basis, images = torch.stack(self._basis), torch.stack(self._images)
        r = r.to(basis.dtype)
        basis_diagonal = (basis * images).sum(0)
        basis_square = torch.stack([square_of(image) for image in self._images]).sum()
        found = Readings(self._operator)
        for i, omega in enumerate(self._vectors):
            s = left_out[:, i].to(basis.dtype)
            c = basis @ omega
            c = c - s * (s @ c)
            w = omega - c @ basis
            sent = r[:, i] @ basis - c @ images
            length = norms(w).to(exact) ** 2
            scale = torch.where(length > 0, (n - k + 1) / length, 0.0)
            q_out, image_out = s @ basis, s @ images
            d = basis_diagonal - q_out * image_out + scale.to(w.dtype) * (w * sent)
            square = basis_square - square_of(image_out)
            found.add(d, square + scale * square_of(sent))
        return found

    def _orthogonal(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vector along what the basis leaves, and all coefficients, the length last."""
        coefficients = vector.new_zeros(len(self._basis))
        for _ in range(2):
            if self._basis:
                now = torch.stack([q @ vector for q in self._basis])
                vector = vector - _mix(self._basis, now)
                coefficients = coefficients + now
        length = norms(vector).to(vector.dtype)
        unit = vector / torch.where(length > 0, length, 1.0)
        return unit, torch.cat((coefficients, length[None]))


def _mix(rows: list[Tensor], coefficients: Tensor) -> Tensor:
    found = torch.zeros_like(rows[0])
    for row, c in zip(rows, coefficients.to(rows[0].dtype).unbind(), strict=True):
        found.addcmul_(row, c)
    return found
