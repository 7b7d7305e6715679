"""What a random start proves about the eigenvalues that a Lanczos run has not shown.

From a unit start v, Lanczos sees the measure Σ wᵢ δ(λᵢ) with wᵢ = (uᵢᵀv)². Let p₀ … p_m be its
orthonormal polynomials, which the run's own coefficients give, and K_m = Σ p_j². An atom at x
weighs at most 1/K_m(x) (Christoffel), so an eigenvalue at x to which the start gave a weight of
at least s² shows itself by K_m(x) ≤ 1/s². A Gaussian start gives less than that to any one
direction only with a small chance, and that was decided when it was drawn: the bound holds
whatever rule stopped the run, and however often one looked.

Source: van Dorsselaer, Hochstenbach & van der Vorst (2001), SIAM J. Matrix Anal. Appl. 22,
837–852, who use the last polynomial alone; the sum of squares is at least as sharp. It assumes an
exact recurrence; callers keep away from the Ritz values by the rounding of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dyndiag.curvature.lanczos import Floats


def effective_size(size: int, fixed: float = 0.0, random: float = 1.0) -> float:
    """What `size` counts for when the start is fixed · f + random · z, f a unit vector and z
    Gaussian of unit expected norm: size · (fixed² + random²) / random². An equal mixture counts
    double; a start without a random part certifies nothing.

    >>> effective_size(1000, fixed=1.0, random=1.0)
    2000.0
    """
    return size * (fixed**2 + random**2) / random**2


def needed(size: float, risk: float) -> float:
    """The K_m(x) that leaves an eigenvalue at x only the chance `risk`, for an effective size.

    Scale the start to unit mean square norm. Its part y along u is Gaussian around some centre with
    variance 1/size, so with a density of at most √(size/2π), and independent of the part across u,
    whose norm √M has a mean of at most 1. w ≤ s² means y² ≤ M s²/(1 − s²), so the chance of it is
    at most √(2·size/π) · s/√(1 − s²). Solved for 1/s².
    """
    return 1.0 + 2.0 * size / (math.pi * risk**2)


def excludes(
    diagonal: Sequence[float], couplings: Sequence[float], points: Floats, need: float
) -> NDArray[np.bool_]:
    """Whether K_m(x) ≥ need, for each x of `points`. Costs m passes over the points.

    `couplings` is as long as `diagonal`: the off-diagonal, then the norm of the remainder.
    """
    before, now = np.zeros_like(points), np.ones_like(points)
    total, previous = np.ones_like(points), 0.0
    settled = total >= need
    # x/0 = ∞ is right: a coupling of 0 means that the space is exhausted. 0/0, at a Ritz value,
    # stays NaN and excludes nothing; and what overflows has long been settled.
    with np.errstate(all="ignore"):
        for alpha, beta in zip(diagonal, couplings, strict=True):
            before, now = now, ((points - alpha) * now - previous * before) / beta
            total, previous = total + now**2, beta
            settled |= total >= need
    return settled


def reach(
    diagonal: Sequence[float], couplings: Sequence[float], value: float, need: float, sign: int
) -> float:
    """The nearest x beyond `value`, on the side of `sign`, from which on nothing can be hidden.

    `value` is the run's outermost Ritz value on that side: outside of it K_m grows. ±inf when the
    run is too short to say.
    """
    scale = max(max(map(abs, diagonal)), max(couplings))
    if scale == 0.0:
        return value
    offsets = scale * np.geomspace(1e-17, 1e12, 128)
    for _ in range(4):  # each pass cuts the bracket, a factor of 1.7 after the first, into 127
        passed = excludes(diagonal, couplings, value + sign * offsets, need)
        if not passed.any():
            return sign * math.inf
        first = int(passed.argmax())
        offsets = np.geomspace(offsets[max(first - 1, 0)], offsets[first], 128)
    return float(value + sign * offsets[-1])
