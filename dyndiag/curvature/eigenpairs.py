"""Eigenvalues at the ends of the spectrum, with bounds that hold and a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndiag.curvature.certificate import (
    Christoffel,
    effective_size,
    excludes,
    excludes_between,
    needed,
    reach,
)
from dyndiag.curvature.draws import fixed_generator, gaussian
from dyndiag.curvature.lanczos import Floats, Lanczos, norms
from dyndiag.curvature.memory import require, vectors_that_fit
from dyndiag.curvature.operator import Operator, require_operator
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
    certificate_width: float | None = None,
    risk: float = 1e-3,
    max_products: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenpairs, or the smallest, both, or the largest in magnitude.

    Ends, converged, when every error bound is at most `relative_tolerance` · |value| and when, but
    for a chance of `risk`, no eigenvalue hides more than `certificate_width` · |value| beyond or
    between the values returned (0.01 for one pair; 0.003 for several, which may lie close
    together); or else after `max_products` products (64, and 8 more for each
    further pair; never more than `size`). Where a value is so small that rounding exceeds these
    shares of it, the rounding level takes their place: `error_bounds` says so.

    Eigenvalues closer together than `certificate_width` may be returned as one, and one of higher
    multiplicity once, unless the products suffice to exhaust the space. With
    `certificate_width=math.inf` the residuals alone decide, which is cheaper and proves only that
    *some* eigenvalues are near: such an end is called provisional, and not converged.

    `start`: (size,), a guess such as the previous vector; an equal random part is mixed in, so that
    what it has no part of can be found, and the certificate counts it. Without a `generator`, the
    same answer at every call; with a CPU one, the same on every device.

    `max_basis`: vectors that the basis may hold, at least 3 more than there are pairs (5 by
    magnitude). A full basis is compressed to its outermost Ritz vectors, and the run goes on from
    there (thick restart) with its certificate. By default 65, and 8 for each further pair, so that
    the default budget needs no restart; or as many as fit into four fifths of the free memory.

    Cost: products; a pass over the basis twice a product; memory for max_basis + pairs + 3
    vectors, of which the basis is allocated as it grows. A DyndiagError, before any of it is, if
    it cannot fit.
    """
    require_operator(operator)
    if certificate_width is None:
        certificate_width = 0.01 if k == 1 else 0.003
    _check(operator, k, which, relative_tolerance, certificate_width, risk, max_products)
    generator = generator or fixed_generator()
    pairs = 2 * k if which == "both" else k
    budget = min(_default_products(pairs) if max_products is None else max_products, operator.size)
    size = effective_size(operator.size, 0.0 if start is None else 1.0)
    rules = _Rules(k, which, relative_tolerance, certificate_width, size, risk)
    rows, unrestarted = _rows(operator, rules, max_basis, budget), budget + 1

    run = Lanczos(operator, _first_vector(operator, start, generator), rows)
    past: list[Christoffel] = []
    moments: list[Christoffel] = []
    while True:
        run.extend()
        if not run.finite:
            return _result(operator, run, rules, moments, Outcome.NOT_FINITE)
        moments = [*past, Christoffel.of(run)]
        if _accurate(run, rules) and _certified(run, rules, moments):
            certified = run.complete or not math.isinf(certificate_width)
            outcome = Outcome.CONVERGED if certified else Outcome.PROVISIONAL
            return _result(operator, run, rules, moments, outcome)
        if run.products == budget:
            outcome = _missing(_accurate(run, rules), _certified(run, rules, moments))
            return _result(operator, run, rules, moments, outcome)
        exhausted = run.exhausted
        if rows < unrestarted and len(run) + 2 > rows:
            values, _ = run.ritz()
            run.compress(rules.kept(values, rows))
            past = moments
        if exhausted:
            run.restart(gaussian(operator, generator))
            past = []


@dataclass(frozen=True)
class _Rules:
    """What the caller asked for."""

    k: int
    which: Which
    relative_tolerance: float
    certificate_width: float
    size: float
    """What the operator's size counts for, given the start."""
    risk: float

    def need(self, shown: int) -> float:
        """The K that leaves the outermost hidden eigenvalue, which `shown` of the wanted lie
        beyond, the chance that is granted to it.

        It is then the one of that rank, so that the chances of all k ranks may add up to the
        risk. They are (k + 1)/k · risk/(r (r + 1)), r = k − shown: K grows slowest about the last.
        """
        rank = self.k - shown
        granted = (self.k + 1) / self.k * self.risk / (rank * (rank + 1))
        return needed(self.size, granted / 2 if self.which == "both" else granted)

    def as_far_out(self, mark: float, values: Floats) -> int:
        """How many of the wanted among `values` are at least as far out as `mark`; all but one at
        the most. `mark` and `values`: times −1 at the lower end."""
        reach = np.abs(values) if self.which == "magnitude" else values
        return min(int(np.sum(reach >= mark)), self.k - 1)

    @property
    def need_beyond(self) -> float:
        """The K that leaves the whole risk to an eigenvalue beyond all others (or half of it at
        each end)."""
        one_end = self.which in ("largest", "smallest")
        return needed(self.size, self.risk if one_end else self.risk / 2)

    @property
    def pairs(self) -> int:
        return 2 * self.k if self.which == "both" else self.k

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

    @property
    def fewest_kept(self) -> int:
        """Ritz vectors that a restart must keep: the wanted, and by magnitude both ends too."""
        return {"both": 2 * self.k, "magnitude": self.k + 2}.get(self.which, self.k)

    def kept(self, values: Floats, rows: int) -> NDArray[np.intp]:
        """Indices of what a restart keeps of ascending `values` in a basis of so many rows."""
        count = self.fewest_kept + (rows - 2 - self.fewest_kept) // 2
        ascending = np.arange(len(values))
        match self.which:
            case "largest":
                return ascending[-count:]
            case "smallest":
                return ascending[:count]
            case "both":
                return np.union1d(ascending[: count // 2], ascending[-(count // 2) :])
            case "magnitude":
                outermost = np.argsort(-np.abs(values), kind="stable")[: count - 2]
                return np.union1d(outermost, ascending[[0, -1]])

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


def _accurate(run: Lanczos, rules: _Rules) -> bool:
    """Whether the residuals are as asked for."""
    if len(run) < rules.k:
        return False
    values, bounds, rounding = _bounds(run, rules)
    return not np.any(bounds > _margin(values, rules.relative_tolerance, rounding))


def _certified(run: Lanczos, rules: _Rules, moments: list[Christoffel]) -> bool:
    """Whether nothing hides beyond or between the wanted, but for the risk. Costs no product."""
    if len(run) < rules.k:
        return False
    if run.complete or math.isinf(rules.certificate_width):
        return True
    values, _ = run.ritz()
    rounding = run.rounding(values)
    # What lies before the last start vector is exhausted and hides nothing: ask what came after.
    shown, _ = run.segment_ritz()
    for sign, edge in rules.edges(values).items():
        marks = np.sort(np.append(edge, sign * shown[sign * shown > edge]))
        margins = _margin(marks, rules.certificate_width, rounding)
        if run.exhausted:  # this segment hides copies of what it shows, and nothing else
            if np.any(marks > edge + margins[0]):
                return False
            continue
        margins -= rounding
        if not excludes(moments, sign * (marks[-1:] + margins[-1:]), rules.need(0)).all():
            return False
        lows, highs = marks[:-1] + margins[:-1], marks[1:] - margins[1:]
        for low, high, mark in zip(lows, highs, marks[1:], strict=True):
            points = np.sort(sign * np.linspace(low, high, _POINTS_IN_A_GAP))
            need = rules.need(rules.as_far_out(mark, sign * shown))
            if low < high and not excludes_between(moments, points, need).all():
                return False
    return True


def _missing(accurate: bool, certified: bool) -> Outcome:
    if accurate:
        return Outcome.CERTIFICATE_MISSING
    return Outcome.RESIDUAL_MISSING if certified else Outcome.BOTH_MISSING


def _bounds(run: Lanczos, rules: _Rules) -> tuple[Floats, Floats, float]:
    """The wanted Ritz values, their error bounds, and the rounding in these."""
    values, _ = run.ritz()
    chosen, rounding = rules.chosen(values), run.rounding(values)
    return values[chosen], run.residuals()[chosen] + rounding, rounding


def _margin(values: Floats, share: float, rounding: float) -> Floats:
    return np.maximum(share * np.abs(values), 2 * rounding)


def _first_vector(operator: Operator, start: Tensor | None, generator: torch.Generator) -> Tensor:
    random = gaussian(operator, generator)
    if start is None:
        return random
    if not isinstance(start, Tensor) or start.shape != (operator.size,):
        came = f"has shape {tuple(start.shape)}" if isinstance(start, Tensor) else f"is {start!r}"
        raise DyndiagError(
            f"start must be a tensor of shape ({operator.size},), one number for each of the "
            f"operator's dimensions, but it {came}"
        )
    guess = start.to(device=operator.device, dtype=operator.dtype)
    norm = norms(guess).item()
    if not 0 < norm < math.inf:
        raise DyndiagError(
            f"start must be finite and not zero, but its norm is {norm}: leave it out instead"
        )
    return guess / norm + random / math.sqrt(operator.size)


def _default_products(pairs: int) -> int:
    return 64 + 8 * (pairs - 1)


def _rows(operator: Operator, rules: _Rules, max_basis: int | None, budget: int) -> int:
    """Rows of the basis: as many as asked for, or as are useful and fit."""
    pairs, fewest = rules.pairs, rules.fewest_kept + 3
    if max_basis is not None and max_basis < fewest:
        raise DyndiagError(
            f"max_basis must be at least {fewest} for k={rules.k} and which={rules.which!r}, "
            f"but it is {max_basis}"
        )
    rows = min(max_basis or _default_products(pairs) + 1, budget + 1)
    beside = pairs + 3  # the vectors returned; a product's image and its projections
    fit = vectors_that_fit(operator.size, operator.dtype, operator.device)
    if fit is not None and max_basis is None:
        rows = min(rows, max(fit - beside, fewest))
    what = f"{pairs} eigenpair{'s' * (pairs > 1)} from a basis of {rows}"
    require(rows + beside, operator.size, operator.dtype, operator.device, what)
    return rows


def _result(
    operator: Operator,
    run: Lanczos,
    rules: _Rules,
    moments: list[Christoffel],
    outcome: Outcome,
) -> Eigenpairs:
    """The reading of the run as it stands; NaN within ±inf where it is too short for k pairs."""
    count = rules.pairs
    values, bounds = np.full(count, np.nan), np.full(count, np.inf)
    vectors = torch.full(
        (count, operator.size), math.nan, dtype=operator.dtype, device=operator.device
    )
    upper = None if rules.which == "smallest" else math.inf
    lower = None if rules.which == "largest" else -math.inf
    if len(run) >= rules.k:
        ritz, mixing = run.ritz()
        values, bounds, rounding = _bounds(run, rules)
        vectors = run.combine(torch.from_numpy(mixing[:, rules.chosen(ritz)].T))
        vectors /= norms(vectors)[:, None].to(vectors.dtype)
        # Beyond an exhausted segment nothing lies.
        if upper is not None:
            upper = (ritz[-1] if run.segment else reach(moments, rules.need_beyond, 1)) + rounding
        if lower is not None:
            lower = (ritz[0] if run.segment else reach(moments, rules.need_beyond, -1)) - rounding
    return Eigenpairs(
        values=torch.from_numpy(values),
        vectors=vectors,
        error_bounds=torch.from_numpy(bounds),
        products=run.products,
        risk=rules.risk,
        upper_bound=None if upper is None else float(upper),
        lower_bound=None if lower is None else float(lower),
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
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= operator.size:
        raise DyndiagError(
            f"k must be a whole number between 1 and the operator's size, {operator.size}, but it "
            f"is {k!r}"
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
