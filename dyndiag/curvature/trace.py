"""The trace, by the estimator that the spectrum asks for, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dyndiag.curvature.deflation import Deflation
from dyndiag.curvature.draws import fixed_generator, gaussian, rademacher
from dyndiag.curvature.lanczos import Floats
from dyndiag.curvature.memory import require, vectors_that_fit
from dyndiag.curvature.operator import Operator, require_operator
from dyndiag.curvature.readings import Readings, exact_dtype, square_of, total
from dyndiag.curvature.results import Outcome, Trace
from dyndiag.curvature.xtrace import WIDENING, XTrace
from dyndiag.errors import DyndiagError

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "krylov"]

_PILOTS = 6
"""Probes before the first look: fewer say too little about their own scatter."""
_LOOK = 4
"""Rows of a Krylov basis between two looks at the probes."""
_FIRST_ROWS = 12
"""Rows before the first judgement: a random start has to find the outliers first."""
_FIRST_LOOK = 12
"""Products before the first look of a method whose every look is a computation of its own."""
_WORTH_A_BASIS = 20
"""Foreseen products below which a basis cannot pay: its first rows are still random."""


def trace(
    operator: Operator,
    *,
    method: Method = "auto",
    relative_error: float = 0.05,
    absolute_error: float = 0.0,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Trace:
    """tr A with its standard error; by the way, the traces of A's parts, diag A and ‖A‖_F.

    Ends when the standard error is at most `relative_error` · |value| or at most `absolute_error`,
    from six probes on, or after `max_products` products. Where an indefinite matrix has a trace
    below ‖A‖_F no relative error of it has a meaning: it ends, `Outcome.SMALL_TRACE`, when the
    standard error is at most `relative_error` · ‖A‖_F. A matrix of no more than `max_products`
    dimensions is read exactly, column by column.

    "hutchinson": mean of zᵀAz over probes z of ±1, of variance 2(‖A‖_F² − Σ Aᵢᵢ²) each.
    "krylov": exact on a Krylov basis, Hutchinson on the rest. A row of the basis costs one product,
    and takes out of that variance an amount that its own coefficients tell; it grows as long as
    that exceeds what a further probe would bring (deflation after Gambhir, Stathopoulos & Orginos
    2017, SIAM J. Sci. Comput. 39, A532–A558; Krylov basis after Chen & Hallman 2023, SIAM J. Matrix
    Anal. Appl. 44, 1218–1244).
    "hutch++": exact on a third of the products, from a sketch by another third (Meyer, Musco, Musco
    & Woodruff 2021). "xtrace": every test vector probes what the others leave (Epperly, Tropp &
    Webber 2024); its scatter is widened by 1.3, since the estimates share their products.
    "auto": "hutchinson", or "krylov" where six probes, which stay of use, foresee more than twenty
    further products: on a flat spectrum its basis ends after some rows that bring nothing.

    All are unbiased, for indefinite matrices too, but for the choice of when to stop. Two standard
    errors cover less than 95 % with few probes: `Trace.interval` has Student's factor.

    Without a `generator`, the same answer at every call; with a CPU one, the same on every device.
    Memory, in vectors of size numbers: six for "hutchinson"; for "krylov", or "auto" that may come
    to it, 16 and one for each row of the basis; one a product for "hutch++", 2.5 for "xtrace". At
    most one sync a product, none for the first six.
    """
    require_operator(operator)
    _check(method, relative_error, absolute_error, max_products)
    goal = _Goal(relative_error, absolute_error)
    generator = generator or fixed_generator()
    if operator.size <= max_products:
        return _exact(operator)
    match method:
        case "auto" | "hutchinson" | "krylov":
            return _deflated(operator, method, goal, max_products, generator)
        case "hutch++":
            return _hutch_pp(operator, goal, max_products, generator)
        case "xtrace":
            return _xtrace(operator, goal, max_products, generator)


@dataclass(frozen=True)
class _Goal:
    relative: float
    absolute: float

    def tolerance(self, look: _Look) -> float:
        """The standard error at which to end."""
        return max(self.relative * max(abs(look.value), look.norm), self.absolute)

    def outcome(self, look: _Look) -> Outcome:
        if not math.isfinite(look.value):
            return Outcome.NOT_FINITE
        if look.probes < _PILOTS or not look.error <= self.tolerance(look):
            return Outcome.BUDGET_SPENT
        if look.error <= max(self.relative * abs(look.value), self.absolute):
            return Outcome.CONVERGED
        return Outcome.SMALL_TRACE

    def reached(self, look: _Look) -> bool:
        return self.outcome(look) is not Outcome.BUDGET_SPENT


@dataclass(frozen=True)
class _Look:
    """What the probes say so far, on the host."""

    readings: Readings
    table: Floats
    """(probes, 2 + parts): trace, square and parts."""
    variance: float
    """Of the trace of one probe."""
    known: float = 0.0
    """The part of the trace that is exact."""
    widening: float = 1.0

    @property
    def probes(self) -> int:
        return len(self.table)

    @property
    def value(self) -> float:
        return self.known + float(self.table[:, 0].mean())

    @property
    def error(self) -> float:
        return self.widening * math.sqrt(self.variance / self.probes)

    @property
    def norm(self) -> float:
        return math.sqrt(max(float(self.table[:, 1].mean()), 0.0))


def _deflated(
    operator: Operator, method: Method, goal: _Goal, budget: int, generator: torch.Generator
) -> Trace:
    """Hutchinson's estimator on what a Krylov basis leaves, or on everything."""
    rest = Deflation(operator)
    pilots = min(_PILOTS, budget)
    rows = _affordable_rows(operator, pilots, budget)
    can_grow = rows > 0 and (method == "krylov" or (method == "auto" and rows >= _WORTH_A_BASIS))
    readings = Readings(operator)
    for _ in range(pilots):
        z = rademacher(operator, generator)
        if can_grow:
            rest.keep(z)
        else:
            rest.send(z, readings)
    look = _look(rest, rest.readings() if can_grow else readings)
    used, ended = pilots, goal.reached(look) or pilots == budget
    reason = _foresight(method, goal, look, ended)
    if can_grow and not ended and (method == "krylov" or _pays(rest, look, goal, budget)):
        before = look.variance
        look = _grow(rest, look, goal, budget, rows, generator)
        used += len(rest)
        left = look.variance / before if before else 0.0
        reason += f"; a basis of {len(rest)} vectors left {left:.2g} of a probe's variance"
        ended = not rest.finite or goal.reached(look) or used == budget
    if not ended:
        readings = look.readings
        rest.forget()
    while not ended:
        rest.send(rademacher(operator, generator), readings)
        used += 1
        look = _look(rest, readings)
        ended = goal.reached(look) or used == budget
    outcome = goal.outcome(look) if rest.finite else Outcome.NOT_FINITE
    name = "krylov" if len(rest) else "hutchinson"
    return _result(operator, look, rest, used, outcome, name, reason)


def _affordable_rows(operator: Operator, pilots: int, budget: int) -> int:
    """Rows that a basis may come to have: by the budget, and by the memory beside the probes."""
    fit = vectors_that_fit(operator.size, operator.dtype, operator.device)
    most = budget - pilots
    return most if fit is None else max(min(most, fit - 2 * pilots - 4), 0)


def _foreseen(goal: _Goal, look: _Look) -> float:
    """Probes that Hutchinson's estimator would need."""
    tolerance = goal.tolerance(look)
    return look.variance / tolerance**2 if tolerance else math.inf


def _pays(rest: Deflation, look: _Look, goal: _Goal, budget: int) -> bool:
    """Whether a basis can be expected to save products.

    Its rows can take what a few eigenvalues hold of the variance, Σ (λ − mean)², and they hold it
    only if (Σ (λ − mean)²)² / Σ (λ − mean)⁴, the number of equal ones that would, is small.
    """
    probes = min(_foreseen(goal, look), budget)
    return probes > _WORTH_A_BASIS and 2 * rest.holders(look.value / rest.operator.size) < probes


def _foresight(method: Method, goal: _Goal, look: _Look, ended: bool) -> str:
    if method != "auto":
        return f"method={method!r} was asked for"
    if ended:
        return f"{look.probes} probes were enough"
    rank = look.value**2 / look.norm**2
    return f"effective rank {rank:.2g}, so about {_foreseen(goal, look):.3g} probes were foreseen"


def _grow(
    rest: Deflation,
    look: _Look,
    goal: _Goal,
    budget: int,
    rows: int,
    generator: torch.Generator,
) -> _Look:
    """Add rows to the basis while they bring more than probes would.

    A row q takes 2‖Bq‖² − (qᵀBq)² = α² + 2β² from ‖B‖_F², with α = qᵀBq and β the remainder. The
    mean of the eigenvalues costs a probe of ±1 nothing, so α counts from there.
    """
    size, since_look = rest.operator.size, 0.0
    direction = gaussian(rest.operator, generator)
    for m in range(1, min(rows, size - 1) + 1):
        direction = rest.extend(direction)
        if not rest.finite:
            return look
        if rest.exhausted:
            direction = gaussian(rest.operator, generator)
        mean = (look.value - rest.trace) / (size - m)
        since_look += 2 * ((rest.columns[-1][-1] - mean) ** 2 + 2 * rest.remainder**2)
        if m % _LOOK == 0:
            look = _look(rest, rest.readings())
            price = max(goal.tolerance(look) ** 2, look.variance / (budget - m))
            if goal.reached(look) or (m >= _FIRST_ROWS and since_look <= _LOOK * price):
                return look
            since_look = 0.0
    return _look(rest, rest.readings())


def _hutch_pp(operator: Operator, goal: _Goal, budget: int, generator: torch.Generator) -> Trace:
    """A third of the products each for the sketch, its basis, and the probes of the rest."""
    if budget < 3:
        raise DyndiagError(f"hutch++ takes at least 3 products, but max_products is {budget}")
    require(budget, operator.size, operator.dtype, operator.device, f"{budget} products of Hutch++")
    rest, used, probes = Deflation(operator), 0, 0
    for spent in _looks(budget):
        while len(rest) < spent // 3 and rest.finite:
            sketch = operator.product(gaussian(operator, generator))
            rest.extend(sketch, spare=gaussian(operator, generator))
            used += 2
        while probes < spent - 2 * (spent // 3):
            rest.keep(rademacher(operator, generator))
            probes, used = probes + 1, used + 1
        look = _look(rest, rest.readings())
        if not rest.finite or goal.reached(look):
            break
    outcome = goal.outcome(look) if rest.finite else Outcome.NOT_FINITE
    return _result(operator, look, rest, used, outcome, "hutch++", "it was asked for")


def _xtrace(operator: Operator, goal: _Goal, budget: int, generator: torch.Generator) -> Trace:
    if budget < 4:
        raise DyndiagError(f"xtrace takes at least 4 products, but max_products is {budget}")
    vectors = 5 * budget // 2
    require(vectors, operator.size, operator.dtype, operator.device, f"{budget} products of XTrace")
    run = XTrace(operator, generator)
    for spent in _looks(budget):
        while len(run) < spent // 2:
            run.extend()
        readings = run.readings()
        table, _ = readings.numbers()
        # Samples that share their basis: only their own scatter tells.
        look = _Look(readings, table, float(table[:, 0].var(ddof=1)), widening=WIDENING)
        if goal.reached(look):
            break
    outcome = goal.outcome(look)
    return _result(operator, look, None, 2 * len(run), outcome, "xtrace", "it was asked for")


def _exact(operator: Operator) -> Trace:
    """Column by column."""
    readings = Readings(operator)
    diagonal = torch.zeros_like(readings.diagonal)
    square = torch.zeros((), dtype=exact_dtype(operator), device=operator.device)
    for i in range(operator.size):
        unit = torch.zeros_like(diagonal)
        unit[i] = 1.0
        column = operator.product(unit)
        diagonal[i] = column[i]
        square += square_of(column)
    readings.add(diagonal, square)
    table, _ = readings.numbers()
    look = _Look(readings, table, 0.0)
    finite = math.isfinite(look.value) and math.isfinite(look.norm)
    outcome = Outcome.CONVERGED if finite else Outcome.NOT_FINITE
    reason = "max_products suffices for every column"
    return _result(operator, look, None, operator.size, outcome, "exact", reason)


def _look(rest: Deflation, readings: Readings) -> _Look:
    table, variance = readings.numbers()
    return _Look(readings, table, variance, known=rest.trace)


def _looks(budget: int) -> Iterator[int]:
    """The products after which a method that shares them is read: a reading costs k² passes."""
    spent = min(_FIRST_LOOK, budget)
    yield spent
    while spent < budget:
        spent = min(max(spent + 3, spent * 5 // 4), budget)
        yield spent


def _result(
    operator: Operator,
    look: _Look,
    rest: Deflation | None,
    products: int,
    outcome: Outcome,
    method: str,
    reason: str,
) -> Trace:
    diagonal, samples = look.readings.diagonal, torch.from_numpy(look.table[:, 2:].copy())
    if rest is not None and len(rest):
        known = rest.diagonal()
        diagonal = diagonal + known
        parts = operator.parts.values()
        sums = [total(known[part], exact_dtype(operator)) for part in parts]
        if sums:
            samples = samples + torch.stack(sums).cpu().double()
    exact, finite = method == "exact", outcome is not Outcome.NOT_FINITE
    scatter = 0.0 if exact else math.nan
    if look.probes > 1:
        scatter = look.widening * float(look.table[:, 1].std(ddof=1)) / math.sqrt(look.probes)
    return Trace(
        value=look.value if finite else math.nan,
        standard_error=(0.0 if exact else look.error) if finite else math.nan,
        products=products,
        outcome=outcome,
        method=method,
        reason=reason,
        probes=0 if exact else look.probes,
        frobenius_norm=look.norm if finite else math.nan,
        frobenius_norm_error=scatter / (2 * look.norm) if look.norm else scatter,
        diagonal=diagonal,
        part_names=tuple(operator.parts),
        part_samples=samples,
        part_widening=look.widening,
    )


def _check(method: str, relative_error: float, absolute_error: float, max_products: int) -> None:
    if method not in get_args(Method):
        raise DyndiagError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if max_products < 1 or not relative_error > 0:
        raise DyndiagError(
            "max_products must be at least 1 and relative_error above 0, but they are "
            f"{max_products} and {relative_error}"
        )
    if not absolute_error >= 0:
        raise DyndiagError(f"absolute_error must be 0 or more, but it is {absolute_error}")
