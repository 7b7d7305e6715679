"""The trace, by Hutchinson's estimator, with its standard error."""

from __future__ import annotations

import math

import numpy as np
import torch

from dyndiag.curvature.draws import fixed_generator, rademacher
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.results import Outcome, Trace
from dyndiag.errors import DyndiagError

_FEWEST = 6
"""Probes before the first look: fewer say too little about their own scatter."""


def trace(
    operator: Operator,
    *,
    relative_error: float = 0.05,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Trace:
    """tr A ≈ mean of zᵀAz over probes z of ±1, the variance of one being 2(‖A‖_F² − Σ Aᵢᵢ²).

    Ends when the standard error is at most `relative_error` · |value|, from six probes on, or after
    `max_products` products. Around a trace of zero no relative error can be met: the budget is then
    spent, and the standard error is the answer. Unbiased also for indefinite operators.

    Without a `generator`, the same answer at every call. Cost: one product a probe, no memory.
    """
    if max_products < 1 or not relative_error > 0:
        raise DyndiagError(
            "max_products must be at least 1 and relative_error above 0, but they are "
            f"{max_products} and {relative_error}"
        )
    generator = generator or fixed_generator()
    samples: list[float] = []
    outcome = Outcome.BUDGET_SPENT
    value = error = math.nan
    for _ in range(max_products):
        z = rademacher(operator, generator)
        samples.append(float(torch.dot(z, operator.product(z))))
        value, error = _mean_and_error(samples)
        if not math.isfinite(value):
            outcome = Outcome.NOT_FINITE
            break
        if len(samples) >= _FEWEST and error <= relative_error * abs(value):
            outcome = Outcome.CONVERGED
            break
    return Trace(value, error, len(samples), outcome)


def _mean_and_error(samples: list[float]) -> tuple[float, float]:
    if len(samples) < 2 or not np.isfinite(samples).all():
        return float(np.mean(samples)), math.nan
    return float(np.mean(samples)), float(np.std(samples, ddof=1) / math.sqrt(len(samples)))
