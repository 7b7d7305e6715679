"""The spectral density: what has converged exactly, stochastic Lanczos quadrature for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.draws import fixed_generator, gaussian
from dyndiag.curvature.lanczos import Floats, Lanczos, norms
from dyndiag.curvature.memory import require
from dyndiag.curvature.operator import Operator, deflated, require_operator
from dyndiag.curvature.results import Outcome, SpectralDensity
from dyndiag.errors import DyndiagError

_GRID = 1001
_WIDTHS_IN_SPREAD = 200
_MARGIN = 5
"""Kernel widths that the grid reaches beyond the outermost nodes: nothing is cut off."""
_ISOLATED = 0.1
"""A Ritz value has converged when its bound is at most this share of the gap to its neighbours."""
_HEAVY = 16.0
"""A start puts more than 16/size on a single eigenvalue once in 16,000 times: a cluster, then."""
_NEAR_ZERO = 1e-3
_UNIFORM = math.sqrt(12)
"""A share that may be anything between 0 and 1 has the standard deviation 1/√12."""


def spectral_density(
    operator: Operator,
    *,
    probes: int = 2,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """φ(t) = (1/size) Σᵢ δ(t − λᵢ), by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    Each probe is a Lanczos run of `steps` products from a Gaussian start. The eigenvalues that the
    first run has resolved, the outliers, are taken out at their exact mass of 1/size each, since
    the mass that a probe puts on a single eigenvalue has a standard deviation of 140 %. The later
    runs go on in the complement of their vectors; the first run's own part there is a probe of it
    too. Each is read by the generalized averaged Gauss rule (Spalević 2007, Math. Comp. 76,
    1483–1492), about two nodes a product, which stay within the run's Ritz values and so within
    the spectrum.

    The scatter of the probes is the doubt in masses and curves: one probe alone has none to show.
    In the bulk a node stands for a cluster of eigenvalues, and a delta at zero cannot be told from
    a narrow bulk around it: `zero_mass` counts both.

    Without a `generator`, the same answer at every call; with a CPU one, the same on every device.
    Cost: probes · steps products, fewer where a run exhausts its space; memory (steps + outliers)
    · size numbers, one run at a time.
    """
    require_operator(operator)
    if probes < 1 or steps < 1:
        raise DyndiagError(f"probes and steps must be at least 1, but are {probes} and {steps}")
    vectors = 3 * min(steps, operator.size) // 2 + 4  # a basis, the outliers, the products' own
    require(vectors, operator.size, operator.dtype, operator.device, f"{steps} steps of Lanczos")
    generator = generator or fixed_generator()

    run = _run(operator, gaussian(operator, generator), steps)
    if not run.finite:
        return _summary(operator.size, np.empty(0), [], 0.0, run.products, Outcome.NOT_FINITE)
    outliers = _resolved(operator, run)
    rests = [_first_rest(run, outliers)]
    products, rounding = run.products, run.rounding(run.ritz()[0])
    outcome, used_up = Outcome.CONVERGED, False
    complement = deflated(operator, outliers.vectors) if len(outliers.values) else operator
    del run
    for _ in range(probes - 1):
        if len(outliers.values) == operator.size:
            break
        run = _run(complement, _across(outliers.vectors, gaussian(operator, generator)), steps)
        products += run.products
        if not run.finite:
            outcome = Outcome.NOT_FINITE
            break
        rests.append(_averaged_rule(run.diagonal, run.couplings, run.exhausted))
        rounding = max(rounding, run.rounding(run.ritz()[0]))
        used_up = used_up or outliers.repeated_in(run)
    if used_up:  # of a multiple eigenvalue, the first start's whole part was taken out
        rests = rests[1:]
    return _summary(operator.size, outliers.values, rests, rounding, products, outcome)


@dataclass(frozen=True)
class _Outliers:
    """Eigenpairs taken out."""

    indices: np.ndarray[tuple[int], np.dtype[np.intp]]
    """Among the first run's Ritz values."""
    values: Floats
    bounds: Floats
    vectors: Tensor
    """(c, size), orthonormal rows."""

    def repeated_in(self, run: Lanczos) -> bool:
        """Whether a run in the complement still finds mass at a value that was taken out."""
        values, vectors = run.ritz()
        heavy = vectors[0] ** 2 > 0.01 / self.vectors.shape[1]
        apart = np.abs(self.values[:, None] - values[heavy])
        return bool((apart <= self.bounds[:, None] + run.rounding(values)).any())


@dataclass(frozen=True)
class _Rule:
    """A quadrature of one probe's measure."""

    nodes: Floats
    """Ascending."""
    weights: Floats
    """They sum to 1."""
    doubtful: Floats
    """Gauss nodes, ascending, that stand for what lies around them; none if the rule is exact."""
    masses: Floats
    """Theirs."""


_NO_DOUBT = (np.empty(0), np.empty(0))


def _run(operator: Operator, start: Tensor, steps: int) -> Lanczos:
    run = Lanczos(operator, start, max_basis=steps + 1)
    for _ in range(steps):
        run.extend()
        if not run.finite or run.exhausted:
            break
    return run


def _across(vectors: Tensor, start: Tensor) -> Tensor:
    """The start less its part along the rows of `vectors`; twice, for rounding."""
    for _ in range(2):
        start = start - vectors.T @ (vectors @ start)
    return start


def _resolved(operator: Operator, run: Lanczos) -> _Outliers:
    """The run's eigenpairs that stand alone: bounds well within their gaps, and no cluster."""
    values, vectors = run.ritz()
    bounds = run.residuals() + run.rounding(values)
    gaps = np.minimum(np.diff(values, prepend=-np.inf), np.diff(values, append=np.inf))
    alone = (bounds <= _ISOLATED * gaps) & (vectors[0] ** 2 <= _HEAVY / operator.size)
    if run.complete:
        alone[:] = True
    elif alone.all():  # few distinct eigenvalues, of unknown multiplicities
        alone[:] = False
    found = np.flatnonzero(alone)
    rows = run.combine(torch.from_numpy(vectors[:, found].T.copy()))
    rows = rows / norms(rows)[:, None].to(rows.dtype)
    return _Outliers(found, values[found], bounds[found], rows)


def _first_rest(run: Lanczos, outliers: _Outliers) -> _Rule:
    """What the first start holds of the complement, as a probe of it."""
    values, vectors = run.ritz()
    nodes = np.delete(values, outliers.indices)
    roots = np.delete(vectors[0], outliers.indices)
    if len(nodes) < 3 or run.exhausted:
        return _Rule(nodes, roots**2 / max(np.sum(roots**2), 1e-300), *_NO_DOUBT)
    # The same recurrence, without the outliers; its last coupling is not known, so one step less.
    held = torch.from_numpy(nodes)
    small = Operator(lambda v: held * v, len(nodes), torch.float64, torch.device("cpu"))
    again = _run(small, torch.from_numpy(roots), len(nodes) - 1)
    return _averaged_rule(again.diagonal, again.couplings, again.exhausted)


def _averaged_rule(diagonal: list[float], couplings: list[float], exhausted: bool) -> _Rule:
    """The Gauss rule of a run's m coefficients, and, unless it is exact, of their mirror image.

    The generalized averaged rule has the Jacobi matrix [T′, α_m, reversed T′], with T′ the first
    m − 1 rows of T. It costs no product. Nodes beyond the Ritz values are moved onto the outermost.
    """
    ritz, vectors = np.linalg.eigh(_tridiagonal(diagonal, couplings[:-1]))
    masses = vectors[0] ** 2
    if exhausted:
        return _Rule(ritz, masses, *_NO_DOUBT)
    if len(diagonal) < 2:
        return _Rule(ritz, masses, ritz, masses)
    mirrored = diagonal + diagonal[-2::-1]
    nodes, vectors = np.linalg.eigh(_tridiagonal(mirrored, couplings + couplings[-3::-1]))
    return _Rule(np.clip(nodes, ritz[0], ritz[-1]), vectors[0] ** 2, ritz, masses)


def _tridiagonal(diagonal: list[float], off: list[float]) -> Floats:
    return np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)


def _summary(
    size: int,
    outliers: Floats,
    rests: list[_Rule],
    rounding: float,
    products: int,
    outcome: Outcome,
) -> SpectralDensity:
    """NaN throughout if not even the first run stayed finite."""
    left = (size - len(outliers)) / size
    exact = np.full(len(outliers), 1 / size)
    rules = [
        _Rule(
            *_sorted(np.append(outliers, rest.nodes), np.append(exact, left * rest.weights)),
            rest.doubtful,
            left * rest.masses,
        )
        for rest in rests
    ]
    grid, width, curves = np.full(_GRID, np.nan), math.nan, np.full((1, _GRID), np.nan)
    negative = zero = (math.nan, math.nan)
    if rules:
        every = np.concatenate([rule.nodes for rule in rules])
        low, high = every.min(), every.max()
        # One point of mass has no spread: its own size, or 1 for the zero matrix, is the scale.
        spread = high - low if high - low > rounding else max(abs(high), abs(low)) or 1.0
        width = spread / _WIDTHS_IN_SPREAD
        grid = np.linspace(low - _MARGIN * width, high + _MARGIN * width, _GRID)
        curves = np.stack([_smooth(rule, grid, width) for rule in rules])
        known = len(outliers) == size
        # A node at −rounding stands for zero; where rounding is 0, so does one at 0.
        negative = _share(rules, -math.inf, math.nextafter(-rounding, -math.inf), known)
        near = max(_NEAR_ZERO * np.abs(every).max(), rounding)
        zero = _share(rules, -near, near, known)
    return SpectralDensity(
        grid=torch.from_numpy(grid),
        density=torch.from_numpy(curves.mean(axis=0)),
        lowest=torch.from_numpy(curves.min(axis=0)),
        highest=torch.from_numpy(curves.max(axis=0)),
        nodes=torch.from_numpy(_rows([rule.nodes for rule in rules], pad_with_last=True)),
        weights=torch.from_numpy(_rows([rule.weights for rule in rules], pad_with_last=False)),
        outliers=torch.from_numpy(outliers),
        negative_mass=negative[0],
        negative_mass_error=negative[1],
        zero_mass=zero[0],
        zero_mass_error=zero[1],
        kernel_width=float(width),
        products=products,
        outcome=outcome,
    )


def _sorted(nodes: Floats, weights: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(nodes, kind="stable")
    return nodes[order], weights[order]


def _share(rules: list[_Rule], low: float, high: float, known: bool) -> tuple[float, float]:
    """The mass in [low, high], mean over the probes, and its standard error.

    A quadrature's distribution function is off by no more than the nodes next to the edge weigh
    (Chebyshev, Markov and Stieltjes). Probes share that doubt, so it is added to their scatter.
    """
    masses = [rule.weights[(rule.nodes >= low) & (rule.nodes <= high)].sum() for rule in rules]
    if known:
        return float(masses[0]), 0.0
    if len(masses) < 2:
        return float(masses[0]), math.nan
    scatter = np.std(masses, ddof=1) / math.sqrt(len(masses))
    doubts = [np.mean([_beside(rule, edge) for rule in rules]) for edge in (low, high)]
    return float(np.mean(masses)), float(np.linalg.norm([scatter, *doubts]))


def _beside(rule: _Rule, edge: float) -> float:
    """The doubt of the heavier of the two Gauss nodes around an edge.

    Beyond the outermost node there is one only within a gap of it: eigenvalues outside the Ritz
    values are near them.
    """
    nodes, right = rule.doubtful, int(np.searchsorted(rule.doubtful, edge))
    around = rule.masses[max(right - 1, 0) : right + 1]
    if right in (0, len(nodes)) and len(nodes) > 1:
        outermost, inner = nodes[:2] if right == 0 else nodes[:-3:-1]
        if abs(edge - outermost) >= abs(outermost - inner):
            return 0.0
    return float(around.max(initial=0.0)) / _UNIFORM


def _rows(probes: list[Floats], *, pad_with_last: bool) -> Floats:
    """(probes, n), one row a probe; a shorter one repeats its last node, at weight zero."""
    most = max(map(len, probes), default=0)
    rows = np.zeros((len(probes), most))
    for row, probe in zip(rows, probes, strict=True):
        row[: len(probe)] = probe
        row[len(probe) :] = probe[-1] if pad_with_last else 0.0
    return rows


def _smooth(rule: _Rule, grid: Floats, width: float) -> Floats:
    kernels = np.exp(-0.5 * ((grid[:, None] - rule.nodes) / width) ** 2)
    smoothed: Floats = kernels @ rule.weights / (width * math.sqrt(2 * math.pi))
    return smoothed
