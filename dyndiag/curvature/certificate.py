"""What a random start proves about the eigenvalues that a Lanczos run has not shown.

From a unit start v, an eigenvector u with eigenvalue x has a part g(x) · (uᵀv) along each vector of
the basis, with polynomials g that the run's own coefficients give. The basis is orthonormal, so
that (uᵀv)² K(x) ≤ 1 with K = Σ g²: an eigenvalue at x to which the start gave a weight of at least
s² shows itself by K(x) ≤ 1/s². A Gaussian start gives less than that to any one direction only with
a small chance, and that was decided when it was drawn: the bound holds whatever rule stopped the
run, however often one looked, and through every thick restart.

Let θᵢ be the Ritz values, yᵢ their vectors, q the next direction, A yᵢ = θᵢ yᵢ + sᵢ q. Then
uᵀyᵢ = sᵢ (uᵀq)/(x − θᵢ), and uᵀq = (uᵀv) · Π(x − ρ)/Π β over all couplings β of the run and the
roots ρ: the Ritz values now, and those that the restarts have discarded. Without a restart K is the
sum of squares of the run's orthonormal polynomials, one over the Christoffel function.

Source: van Dorsselaer, Hochstenbach & van der Vorst (2001), SIAM J. Matrix Anal. Appl. 22,
837–852, who use the last polynomial alone; the sum of squares is at least as sharp. It assumes an
exact recurrence; callers keep away from the Ritz values by the rounding of theirs. The proof, and
what it does not say: docs/certificate.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyndiag.curvature.lanczos import Floats, Lanczos


def effective_size(size: int, fixed: float = 0.0, random: float = 1.0) -> float:
    """What `size` counts for when the start is fixed · f + random · z, f a unit vector and z
    Gaussian of unit expected norm: size · (fixed² + random²) / random². An equal mixture counts
    double; a start without a random part certifies nothing.

    >>> effective_size(1000, fixed=1.0, random=1.0)
    2000.0
    """
    return size * (fixed**2 + random**2) / random**2


def needed(size: float, risk: float) -> float:
    """The K(x) that leaves an eigenvalue at x only the chance `risk`, for an effective size.

    Scale the start to unit mean square norm. Its part y along u is Gaussian around some centre with
    variance 1/size, so with a density of at most √(size/2π), and independent of the part across u,
    whose norm √M has a mean of at most 1. w ≤ s² means y² ≤ M s²/(1 − s²), so the chance of it is
    at most √(2·size/π) · s/√(1 − s²). Solved for 1/s².
    """
    return 1.0 + 2.0 * size / (math.pi * risk**2)


@dataclass(frozen=True)
class Christoffel:
    """K of a run at one moment, in logarithms: its factors reach far beyond what float64 holds."""

    values: Floats
    """Ritz values θᵢ, (m,), of the rows since the last start vector."""
    arms: Floats
    """sᵢ, (m,)."""
    roots: Floats
    """ρ: `values`, and all Ritz values discarded before."""
    log_couplings: float
    """Σ log β."""

    @classmethod
    def of(cls, run: Lanczos) -> Christoffel:
        values, _ = run.segment_ritz()
        roots = np.append(run.discarded, values)
        return cls(values, run.segment_arms(), roots, run.log_couplings)

    def log_parts(self, points: Floats) -> Floats:
        """log g² along q and each yᵢ, (m + 1, points). Each g is a polynomial with real roots."""
        # log 0 = −∞ and its consequences are right: after a coupling of 0 the space is exhausted,
        # K = ∞. What is not a number then, at a Ritz value, counts for nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = np.log(np.abs(points - self.roots[:, None])).sum(axis=0) - self.log_couplings
            shares = np.log(np.abs(self.arms))[:, None]
            parts = ahead + shares - np.log(np.abs(points - self.values[:, None]))
        return np.nan_to_num(2.0 * np.vstack((ahead, parts)), nan=-np.inf, posinf=np.inf)


def excludes(moments: Sequence[Christoffel], points: Floats, need: float) -> NDArray[np.bool_]:
    """Whether K(x) ≥ need for each x of `points`, at any of a run's moments."""
    settled = np.zeros(len(points), dtype=bool)
    for moment in reversed(moments):
        if settled.all():
            break
        k = np.logaddexp.reduce(moment.log_parts(points[~settled]), axis=0)
        settled[~settled] = k >= math.log(need)
    return settled


def excludes_between(
    moments: Sequence[Christoffel], points: Floats, need: float
) -> NDArray[np.bool_]:
    """Whether K ≥ need from each of `points`, ascending, to the next, at any of a run's moments.

    Between two neighbouring roots each part's logarithm is concave, so that it is least at one end.
    """
    settled = np.zeros(len(points) - 1, dtype=bool)
    for moment in reversed(moments):
        if settled.all():
            break
        parts = moment.log_parts(points)
        least = np.logaddexp.reduce(np.minimum(parts[:, :-1], parts[:, 1:]), axis=0)
        below = np.searchsorted(np.sort(moment.roots), points)
        settled |= (least >= math.log(need)) & (below[:-1] == below[1:])
    return settled


def reach(moments: Sequence[Christoffel], need: float, sign: int) -> float:
    """The nearest x beyond all roots, on the side of `sign`, from which on nothing can be hidden.

    Beyond its outermost root every part grows, so K does; and roots never move inwards. ±inf when
    the run is too short to say.
    """
    last = moments[-1]
    value = sign * float((sign * last.roots).max())
    scale = float(max(np.abs(last.roots).max(), np.abs(last.arms).max()))
    if scale == 0.0:
        return value
    offsets = scale * np.geomspace(1e-17, 1e12, 128)
    for _ in range(4):  # each pass cuts the bracket, a factor of 1.7 after the first, into 127
        passed = excludes(moments, value + sign * offsets, need)
        if not passed.any():
            return sign * math.inf
        first = int(passed.argmax())
        offsets = np.geomspace(offsets[max(first - 1, 0)], offsets[first], 128)
    return float(value + sign * offsets[-1])
