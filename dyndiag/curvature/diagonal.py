"""The diagonal, by Bekas, Kokiopoulou & Saad's estimator, with an error for each entry."""

from __future__ import annotations

import math

import torch

from dyndiag.curvature.draws import fixed_generator, rademacher
from dyndiag.curvature.operator import Operator, require_operator
from dyndiag.curvature.readings import square_of
from dyndiag.curvature.results import Diagonal, Outcome
from dyndiag.errors import DyndiagError

_PILOTS = 6


def diagonal(
    operator: Operator,
    *,
    relative_error: float = 0.1,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """diag A ≈ mean of z ∘ Az over probes z of ±1, the variance of entry i being Σ_{j≠i} Aᵢⱼ².

    Ends when the errors are at most `relative_error` of the diagonal, both as Euclidean norms, from
    six probes on, or after `max_products` products. A matrix of no more than `max_products`
    dimensions is read exactly, column by column. Unbiased, also for indefinite matrices. `trace`
    gives the diagonal by the way, and surer where a few eigenvalues hold most of the spectrum.

    Without a `generator`, the same answer at every call. Memory: five vectors of size numbers; one
    sync a product. Source: Bekas, Kokiopoulou & Saad (2007), Appl. Numer. Math. 57, 1214–1229.
    """
    require_operator(operator)
    if max_products < 1 or not relative_error > 0:
        raise DyndiagError(
            "max_products must be at least 1 and relative_error above 0, but they are "
            f"{max_products} and {relative_error}"
        )
    generator = generator or fixed_generator()
    mean = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    if operator.size <= max_products:
        for i in range(operator.size):
            unit = torch.zeros_like(mean)
            unit[i] = 1.0
            mean[i] = operator.product(unit)[i]
        outcome = Outcome.CONVERGED if bool(mean.isfinite().all()) else Outcome.NOT_FINITE
        return Diagonal(mean, torch.zeros_like(mean), operator.size, outcome)

    root = torch.zeros_like(mean)  # of the sum of squares, whose entries float32 may not hold
    outcome = Outcome.BUDGET_SPENT
    for m in range(1, max_products + 1):
        z = rademacher(operator, generator)
        change = z * operator.product(z) - mean
        mean += change / m
        root = torch.hypot(root, math.sqrt((m - 1) / m) * change)
        if m < min(_PILOTS, max_products):
            continue
        spread, size = torch.stack((square_of(root), square_of(mean))).tolist()
        if not math.isfinite(spread + size):
            outcome = Outcome.NOT_FINITE
            break
        if m >= _PILOTS and spread / (m - 1) / m <= relative_error**2 * size:
            outcome = Outcome.CONVERGED
            break
    error = root / math.sqrt((m - 1) * m) if m > 1 else torch.full_like(mean, math.nan)
    return Diagonal(mean, error, m, outcome)
