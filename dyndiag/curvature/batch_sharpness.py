"""Batch sharpness over many mini-batches: what a stochastic gradient meets, with its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import chosen_parameters, undisturbed
from dyndiag.curvature.directional import batch_sharpness
from dyndiag.curvature.hessian import hessian, loss_hessian
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class BatchSharpness:
    """Means over mini-batches, in loss per squared parameter; errors are standard errors."""

    value: float
    """E[gᵀHg / gᵀg], a mean of ratios: batch sharpness."""
    standard_error: float
    interaction_aware: float
    """E[gᵀHg] / E[gᵀg], the ratio of means: interaction-aware sharpness."""
    interaction_aware_error: float
    batches: int
    """On which each of them rests; each cost one gradient and one product."""
    converged: bool
    """The standard error of `value` is within the tolerance."""


def mean_batch_sharpness(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    batches: Iterable[Any],
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    relative_error: float = 5e-3,
    max_batches: int = 1000,
) -> BatchSharpness:
    """Batch sharpness and interaction-aware sharpness at the model's weights, over mini-batches.

    `batches`: mini-batches of the training's size, drawn as the training draws them (a shuffling
    DataLoader); gradient and Hessian are of the same batch. They are read until the standard error
    is within `relative_error` of the value, but at least ten, or until they or `max_batches` end.
    The standard errors hold for batches drawn independently; without replacement from a small set
    they are too large. Batches without a gradient have no ratio and are left out of `value`.

    Plain SGD is said to hover where the value is 2/η, SGD with momentum between 2(1−β)/η at small
    and 2(1+β)/η at large batches: a mean of ratios, which never exceeds the mean of the batches'
    λ₁. The ratio of means is another number, and lower where large gradients meet flat directions.

    The model stays in its mode, and nothing is changed. Cost: one gradient and one product a batch,
    and on the first those of `hessian` with its check, whose engine is taken where double backward
    is wrong or impossible.
    Raises DyndiagError without batches, or for a loss that is not scalar.

    Source: Andreyev & Beneventano (2024), arXiv 2412.20553.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> half = lambda model, x: 0.5 * (model(x) - 7).square().sum()
    >>> found = mean_batch_sharpness(model, half, list(rows))
    >>> round(found.value, 4), found.batches  # the mean of |x|², wherever no residual is zero
    (2.3333, 3)
    """
    if not 0 < relative_error < 1:
        raise DyndiagError(f"relative_error must lie between 0 and 1, but it is {relative_error}")
    chosen = list(chosen_parameters(model, parameters).values())
    ratios: list[float] = []
    pairs: list[tuple[float, float]] = []
    with undisturbed(batches) as source, no_trace(model, loss_fn=loss_fn):
        for batch in source:
            if not pairs:  # the same for all batches: whether a kernel has second derivatives
                engine = hessian(model, loss_fn, batch, parameters=parameters).engine
            of_batch = (
                loss_hessian(partial(loss_fn, model, batch), chosen)
                if engine.name == "cached"
                else hessian(model, loss_fn, batch, parameters=parameters)
            )
            ratio = batch_sharpness(of_batch)
            square = of_batch.gradient.double().square().sum()
            ratio_now, square_now = torch.stack([ratio, square]).tolist()
            pairs.append((ratio_now * square_now if square_now > 0 else 0.0, square_now))
            if square_now > 0:
                ratios.append(ratio_now)
            enough = len(ratios) >= 10 and _error(ratios) <= relative_error * abs(_mean(ratios))
            if enough or len(pairs) >= max_batches:
                break
    if not pairs:
        raise DyndiagError("there is no batch to measure on: pass mini-batches, or a DataLoader")
    value, error = _mean(ratios), _error(ratios)
    aware, aware_error = ratio_of_means(pairs)
    converged = bool(error <= relative_error * abs(value))
    return BatchSharpness(value, error, aware, aware_error, len(pairs), converged)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _error(values: list[float]) -> float:
    """Of the mean of independent values; NaN of fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def ratio_of_means(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Σ curvature / Σ square, and its standard error to first order (the delta method)."""
    curvatures, squares = zip(*pairs, strict=True)
    mean = _mean(list(squares))
    if not mean > 0:
        return math.nan, math.nan
    ratio = math.fsum(curvatures) / math.fsum(squares)
    return ratio, _error([(c - ratio * s) / mean for c, s in pairs])
