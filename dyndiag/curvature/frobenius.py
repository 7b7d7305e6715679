"""The Frobenius norm, from the lengths of the images of random probes."""

from __future__ import annotations

import math

import numpy as np
import torch

from dyndiag.curvature.draws import fixed_generator, rademacher
from dyndiag.curvature.operator import Operator, require_operator
from dyndiag.curvature.readings import exact_dtype, square_of
from dyndiag.curvature.results import FrobeniusNorm, Outcome
from dyndiag.errors import DyndiagError

_PILOTS = 6


def frobenius_norm(
    operator: Operator,
    *,
    relative_error: float = 0.05,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> FrobeniusNorm:
    """‖A‖_F = √(Σ λ²): ‖A‖_F² ≈ mean of ‖Az‖² over probes z of ±1.

    One probe's variance is 2(‖A²‖_F² − Σ (A²)ᵢᵢ²). Ends when the standard error of the norm is at
    most `relative_error` of it, from six probes on, or after `max_products` products. A matrix of
    no more than `max_products` dimensions is read exactly, column by column. The mean square is
    unbiased; its root is too small by about (standard error)² / (2 · value). `trace` gives the norm
    by the way, and surer where a few eigenvalues hold most of it.

    Without a `generator`, the same answer at every call. Memory: three vectors of size numbers; one
    sync a product.
    """
    require_operator(operator)
    if max_products < 1 or not relative_error > 0:
        raise DyndiagError(
            "max_products must be at least 1 and relative_error above 0, but they are "
            f"{max_products} and {relative_error}"
        )
    generator = generator or fixed_generator()
    if operator.size <= max_products:
        square = torch.zeros((), dtype=exact_dtype(operator), device=operator.device)
        for i in range(operator.size):
            unit = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
            unit[i] = 1.0
            square += square_of(operator.product(unit))
        value = math.sqrt(square.item())
        outcome = Outcome.CONVERGED if math.isfinite(value) else Outcome.NOT_FINITE
        return FrobeniusNorm(value, 0.0, operator.size, outcome)

    squares: list[float] = []
    outcome, value, error = Outcome.BUDGET_SPENT, math.nan, math.nan
    while len(squares) < max_products:
        image = operator.product(rademacher(operator, generator))
        squares.append(square_of(image).item())
        value = math.sqrt(np.mean(squares)) if math.isfinite(squares[-1]) else math.nan
        if math.isnan(value):
            outcome, error = Outcome.NOT_FINITE, math.nan
            break
        if len(squares) > 1:
            scatter = float(np.std(squares, ddof=1)) / math.sqrt(len(squares))
            error = scatter / (2 * value) if value else 0.0
            if len(squares) >= _PILOTS and error <= relative_error * value:
                outcome = Outcome.CONVERGED
                break
    return FrobeniusNorm(value, error, len(squares), outcome)
