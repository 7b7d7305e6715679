"""Rayleigh–Ritz on a basis that grows vector by vector, whatever the vectors are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.lanczos import ROUNDING, Floats, norms
from dyndiag.curvature.operator import Operator

_ROWS = 8
"""Rows that are allocated at once."""


class Subspace:
    """An orthonormal basis Q (m, size), the images A Q, and what they say of A's eigenpairs.

    Both live on the operator's device, in its dtype, in blocks of a few rows. Ritz values and
    pairs are counted from the largest. One host–device sync a product, one more a residual.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.finite = True
        self.values: Floats = np.empty(0)
        """Ritz values (m,), descending."""
        self.rounding = 0.0
        """What rounding may hide in a Ritz value or residual."""
        self._products = 0
        self._scale = 0.0
        self._projected: Floats = np.empty((0, 0))
        self._mixing: Floats = np.empty((0, 0))
        self._basis: list[Tensor] = []
        self._images: list[Tensor] = []

    def __len__(self) -> int:
        """Vectors in the basis, which is the number of products spent."""
        return self._products

    @property
    def complete(self) -> bool:
        """The basis spans the whole space."""
        return len(self) >= self.operator.size

    @property
    def last_image(self) -> Tensor:
        """A times the newest vector of the basis, (size,)."""
        return self._images[-1][(len(self) - 1) % _ROWS]

    def extend(self, vector: Tensor) -> None:
        """One product with what is new in `vector`. Sets `finite` False if it held NaN or inf."""
        m = len(self)
        if m % _ROWS == 0:
            for blocks in (self._basis, self._images):
                blocks.append(vector.new_empty(_ROWS, len(vector)))
        for _ in range(2):
            vector = vector / norms(vector).to(vector.dtype)
            for rows in _filled(self._basis, m):
                vector = vector - (rows @ vector) @ rows
        vector = vector / norms(vector).to(vector.dtype)
        image = self.operator.product(vector)
        self._basis[-1][m % _ROWS], self._images[-1][m % _ROWS] = vector, image
        self._products += 1
        size = norms(image)
        column = [(rows @ image).to(size.dtype) for rows in _filled(self._basis, m + 1)]
        *entries, length = torch.cat((*column, size[None])).tolist()
        self.finite = bool(np.isfinite(entries).all() and math.isfinite(length))
        if not self.finite:
            return
        projected = np.zeros((m + 1, m + 1))
        projected[:m, :m] = self._projected
        projected[m, :] = projected[:, m] = entries
        self._projected = projected
        values, mixing = np.linalg.eigh(projected)
        self.values, self._mixing = values[::-1], mixing[:, ::-1]
        self._scale = max(self._scale, length, float(np.abs(values).max()))
        self.rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * self._scale

    def vectors(self, count: int) -> Tensor:
        """Ritz vectors of the `count` largest, (≤ count, size), orthonormal."""
        found = self._combined(self._mixing[:, :count], self._basis)
        return found / norms(found)[:, None].to(found.dtype)

    def residuals(self, first: int, last: int) -> tuple[Tensor, Floats]:
        """A v − θ v of the pairs first … last − 1, (count, size), and their norms, (count,).

        Orthogonal to the basis, up to rounding.
        """
        mixing = self._mixing[:, first:last]
        images = self._combined(mixing, self._images)
        found = images - self._combined(mixing * self.values[first:last], self._basis)
        return found, np.array(norms(found).tolist())

    def along(self, directions: int) -> float:
        """The part of the top Ritz vector's length in the first `directions` of the basis."""
        return float(np.linalg.norm(self._mixing[:directions, 0]))

    def _combined(self, mixing: Floats, blocks: list[Tensor]) -> Tensor:
        weights = torch.from_numpy(mixing.T.copy()).to(blocks[0])
        filled = _filled(blocks, len(self.values))
        found: Tensor = weights[:, :_ROWS] @ filled[0]
        for i, rows in enumerate(filled[1:], 1):
            found = found.addmm_(weights[:, i * _ROWS : (i + 1) * _ROWS], rows)
        return found


def _filled(blocks: list[Tensor], m: int) -> list[Tensor]:
    """The first m rows, block by block."""
    return [rows[: m - i * _ROWS] for i, rows in enumerate(blocks) if m > i * _ROWS]
