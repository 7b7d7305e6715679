"""Where minibatch SGD becomes unstable: several edges, each for another question.

All are statements about a minimum that interpolates (every example's gradient is zero there), on
its quadratic: constant learning rate η, batches of B drawn anew at each step, no momentum, no
decay. *Mean-square* stability: E‖δ‖² of a perturbation δ stays bounded; rare bad batches decide it.
*Single-run* stability: one trajectory stays bounded, which holds up to larger rates. Away from a
minimum, with momentum, with Adam: numbers to look at, which prove nothing.

tr, λ₁, ‖H‖_F: of the training loss's Hessian H, the mean of the examples' Hessians Hᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from dyndiag.errors import DyndiagError
from dyndiag.optimizers.rule import Unknown, UpdateRule


def trace_ratio(trace: float, learning_rate: float, batch_size: float, outputs: int = 1) -> float:
    """η · tr H / (2 B C): above 1, SGD is unstable in mean square; below 1 nothing is promised.

    Proven, for one output (C = 1) and Hᵢ = xᵢxᵢᵀ, batches drawn with replacement: at B = 1 stable ⇒
    ratio ≤ 1, and 1 is the very edge where all ‖xᵢ‖ are equal; with unequal ones the edge was met
    at ratios of 0.22 to 0.76. At B > 1, with equal ‖xᵢ‖: stable ⇒ ratio ≤ 1. Not proven: that a
    ratio below 1 is stable, or anything of single runs. With C outputs, tr/C in the place of tr is
    a guide and no more.

    Source: Wu & Su (2023), "The implicit regularization of dynamical stability in stochastic
    gradient descent", arXiv 2305.17490, for the necessary direction.

    >>> trace_ratio(10.0, learning_rate=0.1, batch_size=1)
    0.5
    """
    _check(learning_rate, batch_size)
    if outputs < 1:
        raise DyndiagError(f"outputs must be the number of them, 1 or more, but it is {outputs}")
    return learning_rate * trace / (2 * batch_size * outputs)


def sufficient_trace_ratio(
    trace: float, sharpness: float, learning_rate: float, batch_size: float
) -> float:
    """η (tr H / B + (1 − 1/B) λ₁) / 2: up to 1, SGD is stable in mean square.

    Proven for one output, Hᵢ = xᵢxᵢᵀ with all ‖xᵢ‖ equal, drawn with replacement; it is the edge
    itself at B = 1, and for gradient descent (B = ∞). A ratio above 1 promises nothing.

    >>> sufficient_trace_ratio(8.0, 4.0, learning_rate=0.25, batch_size=2)
    0.75
    """
    _check(learning_rate, batch_size)
    return learning_rate * (trace / batch_size + (1 - 1 / batch_size) * sharpness) / 2


def frobenius_ratio(
    frobenius_norm: float, learning_rate: float, batch_size: float, alignment: float = 1.0
) -> float:
    """η ‖H‖_F √(μ/B): above 1, SGD is unstable in mean square; below 1 nothing is promised.

    μ is the `alignment` of the gradient noise with the curvature, the least tr(HΣ) / (2L‖H‖_F²)
    around the minimum, with Σ the covariance of the examples' gradients *less* what their mean
    holds (with it the rule fails). Proven with that μ: stable ⇒ ratio ≤ 1 (checked at B = 1). With
    μ = 1, the default, it is the usual yardstick and proves nothing: the true μ may be smaller.

    Source: Wu, Wang & Su (2022), "The alignment property of SGD noise and how it helps select flat
    minima: a stability analysis", arXiv 2207.02628.

    >>> frobenius_ratio(10.0, learning_rate=0.1, batch_size=4)
    0.5
    """
    _check(learning_rate, batch_size)
    return learning_rate * frobenius_norm * math.sqrt(alignment / batch_size)


def gaussian_edge(eigenvalues: Sequence[float], batch_size: float) -> float:
    """The η at which SGD on Gaussian least squares leaves mean-square stability. Exact.

    Inputs x ~ N(0, H), fresh at every step, `batch_size` at a time: the edge solves
    (η/B) Σ λᵢ / (2 − ηλᵢ(1 + 1/B)) = 1. At B = ∞ it is 2/λ₁. `eigenvalues`: all of H, none
    negative. For other inputs, or single runs: another edge.

    >>> round(gaussian_edge([3, 1, 0.5, 0.2, 0.1], batch_size=1), 5)
    0.20353
    """
    _check(1.0, batch_size)
    spectrum = _numbers(eigenvalues, "eigenvalues")
    if spectrum.min() < 0:
        raise DyndiagError(
            "eigenvalues must not be negative, for H is a covariance here, but the smallest is "
            f"{spectrum.min():.3g}"
        )
    highest = float(spectrum.max())
    if highest == 0:
        return math.inf
    share = 0.0 if math.isinf(batch_size) else 1 / batch_size

    def excess(rate: float) -> float:
        return float(np.sum(rate * share * spectrum / (2 - rate * spectrum * (1 + share)))) - 1

    return _root(excess, 0.0, 2 / (highest * (1 + share)))


def mean_square_edge(curvatures: Sequence[float]) -> float:
    """One parameter, each step's curvature h drawn from these: η = 2 E h / E h². Exact.

    Above it E‖δ‖² grows, though a run that one watches may still shrink: see `single_run_edge`. 0
    where E h < 0: every rate is unstable.

    >>> round(mean_square_edge([1, 3]), 12)
    0.8
    """
    h = _numbers(curvatures, "curvatures")
    scale = float(np.abs(h).max())
    if scale == 0:
        return math.inf
    h = h / scale  # whose squares are no longer too small for a number
    return max(2 * float(np.mean(h) / np.mean(h * h)), 0.0) / scale


def single_run_edge(curvatures: Sequence[float]) -> float:
    """One parameter, each step's curvature h drawn from these: the least η with E ln|1 − ηh| ≥ 0.

    The Lyapunov exponent of a run: below the edge almost every run shrinks. Exact, and never below
    `mean_square_edge`. (Some larger rates may be stable again.) 0 where E h < 0.

    >>> round(single_run_edge([1, 3]), 12)
    1.333333333333
    """
    h = _numbers(curvatures, "curvatures")
    if not h.any():
        return math.inf
    if h.mean() < 0:
        return 0.0

    def exponent(rate: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.mean(np.log(np.abs(1 - rate * h))))

    def slope(rate: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.mean(-h / (1 - rate * h)))

    # Between two poles 1/h the exponent is concave, from −∞ to −∞; from the last one it rises.
    poles = np.unique(1 / h[h > 0])
    for left, right in pairwise(poles):
        top = _root(lambda rate: -slope(rate), float(left), float(right))
        if exponent(top) >= 0:
            return _root(exponent, float(left), top)
    far = float(poles[-1])
    while exponent(far) < 0:
        far *= 2
    return _root(exponent, float(poles[-1]), far)


def certain_divergence(
    sharpness: float, coherence: float, examples: int, batch_size: float
) -> float:
    """The η above which SGD is *certain* to be unstable in mean square.

    The lesser of 2/λ₁ and (σ/λ₁)(n/B − 1)^(−½): n examples, each in the batch with chance B/n, of
    Hessians Hᵢ ≽ 0 with coherence σ (`dyndiag.curvature.coherence`). Below it nothing is promised:
    the true edge lay at 0.57 to 1.00 of it in 200 random families. In particular
    η = (2/λ₁) σ / (n/B + σ − 1), which is the edge for n identical and for n orthogonal Hessians of
    rank 1, is no guarantee of stability for others.

    Source: Dexter et al. (2024), "A precise characterization of SGD stability using loss surface
    geometry", arXiv 2401.12332.

    >>> certain_divergence(sharpness=0.125, coherence=1.0, examples=8, batch_size=4)
    8.0
    """
    _check(1.0, batch_size)
    if not (sharpness > 0 and coherence > 0 and batch_size <= examples):
        raise DyndiagError(
            "sharpness and coherence must be above 0 and batch_size at most the number of "
            f"examples, but they are {sharpness}, {coherence}, {batch_size} and {examples}"
        )
    if batch_size == examples:
        return 2 / sharpness
    return min(2.0, coherence / math.sqrt(examples / batch_size - 1)) / sharpness


def plain_sgd_rate(rule: UpdateRule | Unknown) -> float | None:
    """η, if every tensor moves by −η · gradient and by nothing else; None for any other rule."""
    if isinstance(rule, Unknown) or not rule.uniform or rule.preconditioned:
        return None
    first = rule.tensors[0]
    assert first is not None  # uniform: every tensor is moved
    plain = first.gain == 1 and first.coupled_decay == 0 and first.decoupled_decay == 0
    return first.learning_rate if plain else None


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is below 0 at `low` and above at `high` passes 0, to rounding."""
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)


def _numbers(values: Sequence[float], name: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64).reshape(-1)
    if found.size == 0 or not np.isfinite(found).all():
        raise DyndiagError(f"{name} must be finite numbers, at least one")
    return found


def _check(learning_rate: float, batch_size: float) -> None:
    if not (learning_rate >= 0 and batch_size >= 1):
        raise DyndiagError(
            "learning_rate must be 0 or more and batch_size 1 or more, but they are "
            f"{learning_rate} and {batch_size}"
        )
