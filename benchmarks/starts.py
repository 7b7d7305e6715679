"""Thousands of random starts on a known spectrum, at the cost of small matrices.

A Krylov method sees of a matrix and a start only how the start's weight is spread over the
eigenvalues. So a matrix of 0.5 million dimensions with some hundred known groups of eigenvalues,
and a Gaussian start, are the same to it as a small matrix with one eigenvalue a group, and a start
that is chi-distributed there.
"""

from __future__ import annotations

import math

import numpy as np
import problems
import torch
from numpy.random import Generator
from peers import FAST
from problems import Floats, Spectrum
from torch import Tensor

import dyndiag.curvature as curvature


def random_start(spectrum: Spectrum, draw: Generator) -> Floats:
    """A Gaussian vector of unit expected norm, as norms of its parts in the groups."""
    return np.sqrt(_chi_squared(spectrum.counts, draw) / spectrum.size)


def mixed_start(spectrum: Spectrum, draw: Generator) -> Floats:
    """The unit gradient and an equal random part: the part along the gradient adds to it."""
    within = np.minimum(spectrum.counts, 1) * draw.standard_normal(len(spectrum.counts))
    across = _chi_squared(np.maximum(spectrum.counts - 1, 0), draw)
    along = spectrum.gradient + within / math.sqrt(spectrum.size)
    return np.sqrt(along**2 + across / spectrum.size)


def _chi_squared(degrees: Floats, draw: Generator) -> Floats:
    drawn = np.zeros_like(degrees)
    drawn[degrees > 0] = draw.chisquare(degrees[degrees > 0])
    return drawn


class Grouped:
    """The matrix with one eigenvalue a group, turned so that the first vector is `start`.

    A solver draws its own first vector. Whatever that is, the first product fixes a reflection that
    takes it to `start`: from then on this is one symmetric matrix, diagonal up to that reflection.
    """

    def __init__(self, spectrum: Spectrum, start: Floats) -> None:
        self._values = torch.from_numpy(spectrum.values.copy())
        self._start = torch.from_numpy(start / np.linalg.norm(start))
        self._mirror: Tensor | None = None

    def product(self, v: Tensor) -> Tensor:
        if self._mirror is None:
            mirror = v / v.norm() - self._start
            self._mirror = mirror / mirror.norm()
        return self._reflect(self._values * self._reflect(v))

    def _reflect(self, v: Tensor) -> Tensor:
        assert self._mirror is not None
        return v - (2 * (self._mirror @ v)) * self._mirror

    @property
    def operator(self) -> curvature.Operator:
        return curvature.Operator(
            self.product, len(self._values), torch.float64, torch.device("cpu")
        )


def solve(
    spectrum: Spectrum, k: int, draw: Generator, *, fast: bool, gradient: bool
) -> curvature.Eigenpairs:
    """`eigenpairs` as it answers on the whole matrix.

    Its certificate asks for size / risk²: the small matrix takes the risk that gives the same.
    """
    start = (mixed_start if gradient else random_start)(spectrum, draw)
    operator = Grouped(spectrum, start).operator
    return curvature.eigenpairs(
        operator,
        k,
        relative_tolerance=FAST if fast else 1e-3,
        start=torch.ones(operator.size, dtype=torch.float64) if gradient else None,
        certificate_width=math.inf if fast else None,
        risk=1e-3 * math.sqrt(operator.size / spectrum.size),
    )


def floor(spectrum: Spectrum, k: int, draw: Generator, error: float = 1e-3) -> int:
    """Products from which on, for five in a row, the k largest Ritz values of a random start are
    right: no stop rule can do better."""
    within: list[bool] = []

    def enough(values: Floats, _: Floats) -> bool:
        found = values[::-1][:k]
        truth = spectrum.values[:k]
        within.append(len(found) == k and bool(np.all(abs(found - truth) <= error * abs(truth))))
        return all(within[-5:]) and len(within) >= 5

    start = torch.from_numpy(random_start(spectrum, draw))
    values = torch.from_numpy(spectrum.values.copy())
    problems.lanczos(lambda v: values * v, start, 200, enough)
    return len(within) - 4


def power_iteration(
    spectrum: Spectrum, starts: int, draw: Generator, most: int = 100, tolerance: float = 1e-3
) -> tuple[Floats, Floats]:
    """PyHessian's rule: (values returned, products), both (starts,).

    The Rayleigh quotient before the last, once two in a row differ by less than the tolerance.
    """
    weights = np.stack([random_start(spectrum, draw) ** 2 for _ in range(starts)])
    values, products = np.full(starts, np.nan), np.full(starts, float(most))
    before = np.full(starts, np.nan)
    square = (spectrum.values / np.abs(spectrum.values).max()) ** 2
    open_ = np.ones(starts, dtype=bool)
    for i in range(1, most + 1):
        quotient = weights @ spectrum.values / weights.sum(1)
        stops = open_ & (np.abs(before - quotient) / (np.abs(before) + 1e-6) < tolerance)
        values[stops], products[stops] = before[stops], i
        open_ &= ~stops
        before = np.where(open_, quotient, before)
        weights *= square
    values[open_] = before[open_]
    return values, products
