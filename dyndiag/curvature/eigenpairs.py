"""Eigenvalues at the ends of the spectrum, with bounds that hold and a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndiag.curvature.certificate import effective_size, excludes, needed, reach
from dyndiag.curvature.draws import fixed_generator, gaussian
from dyndiag.curvature.lanczos import Floats, Lanczos, norms
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.results import Eigenpairs, Outcome
from dyndiag.errors import DyndiagError

Which = Literal["largest", "smallest", "both", "magnitude"]

_POINTS_IN_A_GAP = 9


def eigenpairs(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "largest",
    start: Tensor | None = None,
    relative_tolerance: float = 1e-3,
    certificate_width: float = 0.01,
    risk: float = 1e-3,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenpairs, or the smallest, both, or the largest in magnitude.

    Ends, converged, when every error bound is at most `relative_tolerance` · |value| and when, but
    for a chance of `risk`, no eigenvalue hides more than `certificate_width` · |value| beyond or
    between the values returned; or else after `max_products` products (64, and 8 more for each
    further pair; never more than `size`). Where a value is so small that rounding exceeds these
    shares of it, the rounding level takes their place: `error_bounds` says so.

    Eigenvalues closer together than `certificate_width` may be returned as one, and one of higher
    multiplicity once, unless the products suffice to exhaust the space. With
    `certificate_width=math.inf` the residuals alone decide, which is cheaper and proves only that
    *some* eigenvalues are near: call such values provisional.

    `start`: (size,), a guess such as the previous vector; an equal random part is mixed in, so that
    what it has no part of can be found, and the certificate counts it. Without a `generator`, the
    same answer at every call; with a CPU one, the same on every device.

    Cost: products, and products · size numbers of memory.
    """
    _check(operator, k, which, relative_tolerance, certificate_width, risk, max_products)
    generator = generator or fixed_generator()
    pairs = 2 * k if which == "both" else k
    budget = min(64 + 8 * (pairs - 1) if max_products is None else max_products, operator.size)
    size = effective_size(operator.size, 0.0 if start is None else 1.0)
    rules = _Rules(k, which, relative_tolerance, certificate_width, needed(size, risk / pairs))

    run = Lanczos(operator, _first_vector(operator, start, generator))
    while True:
        run.extend()
        if not run.finite:
            return _result(operator, run, rules, risk, Outcome.NOT_FINITE)
        if len(run.diagonal) >= k and _satisfied(run, rules):
            return _result(operator, run, rules, risk, Outcome.CONVERGED)
        if run.products == budget:
            return _result(operator, run, rules, risk, Outcome.BUDGET_SPENT)
        if run.exhausted:
            run.restart(gaussian(operator, generator))


@dataclass(frozen=True)
class _Rules:
    """What the caller asked for."""

    k: int
    which: Which
    relative_tolerance: float
    certificate_width: float
    need: float

    def chosen(self, values: Floats) -> NDArray[np.intp]:
        """Indices of the wanted among ascending `values`, the outermost first."""
        ascending = np.arange(len(values))
        smallest, largest = ascending[: self.k], ascending[::-1][: self.k]
        match self.which:
            case "largest":
                return largest
            case "smallest":
                return smallest
            case "both":
                return np.concatenate((largest, smallest))
            case "magnitude":
                return np.argsort(-np.abs(values), kind="stable")[: self.k]

    def edges(self, values: Floats) -> dict[int, float]:
        """{sign: edge}: what has sign · x > edge belongs among the wanted."""
        match self.which:
            case "largest":
                return {1: values[-self.k]}
            case "smallest":
                return {-1: -values[self.k - 1]}
            case "both":
                return {1: values[-self.k], -1: -values[self.k - 1]}
            case "magnitude":
                edge = np.sort(np.abs(values))[-self.k]
                return {1: edge, -1: edge}


def _satisfied(run: Lanczos, rules: _Rules) -> bool:
    """Whether the residuals and the certificate are as asked for. Costs no product."""
    values, vectors = run.ritz()
    chosen, rounding = rules.chosen(values), run.rounding(values)
    bounds = run.couplings[-1] * np.abs(vectors[-1, chosen]) + rounding
    if np.any(bounds > _margin(values[chosen], rules.relative_tolerance, rounding)):
        return False
    if run.complete or math.isinf(rules.certificate_width):
        return True

    # Segments before the last are exhausted, so they hide nothing: ask the last one.
    diagonal, couplings = run.diagonal[run.segment :], run.couplings[run.segment :]
    shown = run.ritz(run.segment)[0]
    for sign, edge in rules.edges(values).items():
        marks = np.sort(np.append(edge, sign * shown[sign * shown > edge]))
        margins = _margin(marks, rules.certificate_width, rounding)
        if run.exhausted:  # this segment hides copies of what it shows, and nothing else
            if np.any(marks > edge + margins[0]):
                return False
        else:
            points = sign * _suspects(marks, margins - rounding)
            if not excludes(diagonal, couplings, points, rules.need).all():
                return False
    return True


def _suspects(marks: Floats, margins: Floats) -> Floats:
    """Points between `marks` (ascending) and beyond the last, no nearer than their margins."""
    gaps = [
        np.linspace(low, high, _POINTS_IN_A_GAP)
        for low, high in zip(marks[:-1] + margins[:-1], marks[1:] - margins[1:], strict=True)
        if low < high
    ]
    return np.concatenate((*gaps, marks[-1:] + margins[-1:]))


def _margin(values: Floats, share: float, rounding: float) -> Floats:
    return np.maximum(share * np.abs(values), 2 * rounding)


def _first_vector(operator: Operator, start: Tensor | None, generator: torch.Generator) -> Tensor:
    random = gaussian(operator, generator)
    if start is None:
        return random
    if start.shape != (operator.size,):
        raise DyndiagError(
            f"start must have shape ({operator.size},), one number for each of the operator's "
            f"dimensions, but it has shape {tuple(start.shape)}"
        )
    guess = start.to(device=operator.device, dtype=operator.dtype)
    norm = norms(guess).item()
    if not 0 < norm < math.inf:
        raise DyndiagError(
            f"start must be finite and not zero, but its norm is {norm}: leave it out instead"
        )
    return guess / norm + random / math.sqrt(operator.size)


def _result(
    operator: Operator, run: Lanczos, rules: _Rules, risk: float, outcome: Outcome
) -> Eigenpairs:
    """The reading of the run as it stands; NaN within ±inf where it is too short for k pairs."""
    count = 2 * rules.k if rules.which == "both" else rules.k
    values, bounds = np.full(count, np.nan), np.full(count, np.inf)
    vectors = torch.full(
        (count, operator.size), math.nan, dtype=operator.dtype, device=operator.device
    )
    upper = None if rules.which == "smallest" else math.inf
    lower = None if rules.which == "largest" else -math.inf
    if len(run.diagonal) >= rules.k:
        ritz, mixing = run.ritz()
        chosen, rounding = rules.chosen(ritz), run.rounding(ritz)
        values = ritz[chosen]
        bounds = run.couplings[-1] * np.abs(mixing[-1, chosen]) + rounding
        vectors = run.combine(torch.from_numpy(mixing[:, chosen].T))
        vectors = vectors / norms(vectors)[:, None].to(vectors.dtype)
        if upper is not None:
            upper = reach(run.diagonal, run.couplings, ritz[-1], rules.need, 1) + rounding
        if lower is not None:
            lower = reach(run.diagonal, run.couplings, ritz[0], rules.need, -1) - rounding
    return Eigenpairs(
        values=torch.from_numpy(values),
        vectors=vectors,
        error_bounds=torch.from_numpy(bounds),
        products=run.products,
        risk=risk,
        upper_bound=upper,
        lower_bound=lower,
        outcome=outcome,
    )


def _check(
    operator: Operator,
    k: int,
    which: str,
    relative_tolerance: float,
    certificate_width: float,
    risk: float,
    max_products: int | None,
) -> None:
    if not 1 <= k <= operator.size:
        raise DyndiagError(
            f"k must be between 1 and the operator's size, {operator.size}, but it is {k}"
        )
    if which not in get_args(Which):
        raise DyndiagError(f"which must be one of {', '.join(get_args(Which))}, not {which!r}")
    if not (relative_tolerance > 0 and certificate_width > 0):
        raise DyndiagError(
            "relative_tolerance and certificate_width must be above 0, but they are "
            f"{relative_tolerance} and {certificate_width}"
        )
    if not 0 < risk < 1:
        raise DyndiagError(f"risk is a probability between 0 and 1, but it is {risk}")
    if max_products is not None and max_products < k:
        raise DyndiagError(
            f"{k} eigenpairs take at least {k} products, but max_products is {max_products}"
        )
