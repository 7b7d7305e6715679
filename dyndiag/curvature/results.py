"""What the estimators return: value, doubt, cost, and why they ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Outcome(Enum):
    """Why an estimator ended, as a sentence."""

    CONVERGED = "everything asked for was reached"
    BUDGET_SPENT = "max_products came first: the bounds are wider than asked for"
    RESIDUAL_MISSING = "max_products came first: the error bounds are wider than asked for"
    CERTIFICATE_MISSING = "max_products came first: the error bounds hold, but a pair may hide"
    BOTH_MISSING = "max_products came first: wide error bounds, and a pair may hide"
    PROVISIONAL = "the error bounds are as asked for; no certificate was, so a pair may hide"
    SMALL_TRACE = "the trace is small beside ‖A‖_F: its error is the share asked for of that norm"
    NOT_FINITE = "a product held NaN or inf: look at the loss before its curvature"


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator, the end asked for first, the outermost first."""

    values: Tensor
    """(k,), or (2k,) for both ends: k largest, then k smallest. Float64, on the CPU. NaN where a
    run that met NaN or inf had not come to a pair."""
    vectors: Tensor
    """One orthonormal row a value, (k, size), on the operator's device, in its dtype."""
    error_bounds: Tensor
    """Like `values`: some eigenvalue lies within values[i] ± error_bounds[i]."""
    products: int
    """Operator products spent."""
    risk: float
    """Chance, over the draw of the start, that the certificate is wrong."""
    upper_bound: float | None
    """No eigenvalue lies above, but for the risk. None if only the smallest were asked for."""
    lower_bound: float | None
    """No eigenvalue lies below, but for the risk. None if only the largest were asked for."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """Every residual is within its tolerance, and the certificate as narrow as asked for."""
        return self.outcome is Outcome.CONVERGED

    @property
    def provisional(self) -> bool:
        """Every residual is within its tolerance, and no certificate was asked for."""
        return self.outcome is Outcome.PROVISIONAL


@dataclass(frozen=True)
class Trace:
    """A trace, and what else the same products tell."""

    value: float
    standard_error: float
    """Of `value`. NaN from a single probe; 0 where the answer is exact."""
    products: int
    """Operator products spent."""
    outcome: Outcome
    method: str
    """"exact", "hutchinson", "hutch++", "xtrace" or "krylov"."""
    reason: str
    """Why this method, in a sentence."""
    probes: int
    """Random probes that the standard error rests on; 0 where the answer is exact."""
    frobenius_norm: float
    """‖A‖_F = √(Σ λ²)."""
    frobenius_norm_error: float
    """Its standard error, from the scatter of the probes. NaN from a single probe."""
    diagonal: Tensor = field(repr=False, compare=False)
    """(size,): an unbiased estimate of each Aᵢᵢ, on the operator's device. The doubt is in the
    single entries: see `diagonal()` for their errors."""
    part_names: tuple[str, ...] = field(repr=False, compare=False)
    part_samples: Tensor = field(repr=False, compare=False)
    """(probes, parts), or one row where the answer is exact: an unbiased estimate of the trace of
    each part's diagonal block from each probe. Float64, on the CPU."""
    part_widening: float = field(default=1.0, repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """The standard error is within its tolerance."""
        return self.outcome is Outcome.CONVERGED

    @property
    def effective_rank(self) -> float:
        """tr² / ‖A‖_F²: how many equal eigenvalues would give both. NaN for the zero matrix."""
        return self.value**2 / self.frobenius_norm**2 if self.frobenius_norm else math.nan

    @property
    def error_share_of_norm(self) -> float:
        """The standard error over ‖A‖_F, which has a meaning where the trace is near zero."""
        return self.standard_error / self.frobenius_norm if self.frobenius_norm else 0.0

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Parameter → (trace of its diagonal block, standard error). They sum to `value`.

        The error is the scatter of the probes: Student's t has `probes` − 1 degrees of freedom.
        """
        return self._grouped({name: [i] for i, name in enumerate(self.part_names)})

    def modules(self, depth: int | None = None) -> dict[str, tuple[float, float]]:
        """Module → (trace, standard error), as `parts`: parameters whose names begin alike.

        `depth` names at most (1: the model's children); None for each parameter's own module. A
        parameter of the model itself belongs to "".
        """
        grouped: dict[str, list[int]] = {}
        for i, name in enumerate(self.part_names):
            grouped.setdefault(".".join(name.split(".")[:-1][:depth]), []).append(i)
        return self._grouped(grouped)

    def _grouped(self, groups: dict[str, list[int]]) -> dict[str, tuple[float, float]]:
        found = {}
        for name, indices in groups.items():
            samples = self.part_samples[:, indices].sum(1)
            error = 0.0 if self.probes == 0 else math.nan
            if len(samples) > 1:
                error = self.part_widening * float(samples.std()) / math.sqrt(len(samples))
            found[name] = (float(samples.mean()), error)
        return found

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The confidence interval by Student's t with one degree of freedom less than probes."""
        if self.probes == 0:
            return (self.value, self.value)
        if self.probes == 1:
            return (-math.inf, math.inf)
        from scipy.special import stdtrit  # a tenth of a second to import: only when asked for

        half = float(stdtrit(self.probes - 1, (1 + confidence) / 2)) * self.standard_error
        return (self.value - half, self.value + half)


@dataclass(frozen=True)
class SpectralDensity:
    """φ(t) = (1/size) Σᵢ δ(t − λᵢ): outliers exactly, the rest by stochastic Lanczos quadrature.

    Tensors: float64, on the CPU. Compare two densities by their nodes and weights: the kernel is
    for pictures only.
    """

    grid: Tensor
    """(G,), ascending, in the operator's unit."""
    density: Tensor
    """(G,), 1/unit: mean over the probes, smoothed by a Gaussian of width `kernel_width`."""
    lowest: Tensor
    """(G,): the lowest of the probes' densities at each point."""
    highest: Tensor
    """(G,): the highest of the probes' densities at each point."""
    nodes: Tensor
    """(probes, n): a row is a probe's own nodes and the outliers, ascending. One row fewer than
    probes where the outliers used up the first, and only one where they are everything."""
    weights: Tensor
    """(probes, n): the mass of each node, 1/size for an outlier; each row sums to 1."""
    outliers: Tensor
    """(c,): the eigenvalues taken out exactly, ascending."""
    negative_mass: float
    """Share of the eigenvalues that lies below zero."""
    negative_mass_error: float
    """Standard error of `negative_mass`: the scatter of the probes, and 1/√12 of the mass of the
    node next to zero, any share of which may lie on its other side. NaN from a single probe."""
    zero_mass: float
    """Share of the eigenvalues with |λ| ≤ 1e-3 of the largest: a delta at zero and what cannot be
    told from it, since a node near zero stands for a whole cluster."""
    zero_mass_error: float
    """Standard error of `zero_mass`, likewise. NaN from a single probe."""
    kernel_width: float
    """Standard deviation of the smoothing, in the operator's unit: spread / 200."""
    products: int
    """Operator products spent."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """Every probe took all its steps, or exhausted its space."""
        return self.outcome is Outcome.CONVERGED

    def mass(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the eigenvalues in each bin, and its standard error: a histogram on any scale.

        `edges`: (b + 1,), ascending, such as `torch.logspace(-6, 0, 61) * largest`. Both results:
        (b,); a bin holds its lower edge, and the last its upper one too. NaN errors from one probe,
        unless everything is known exactly.
        """
        edges = edges.to(self.nodes)
        bins = torch.bucketize(self.nodes, edges, right=True) - 1
        bins[self.nodes == edges[-1]] = len(edges) - 2
        inside = (bins >= 0) & (bins < len(edges) - 1)
        masses = self.weights.new_zeros(len(self.nodes), len(edges) - 1)
        masses.scatter_add_(1, bins.clamp(0, len(edges) - 2), self.weights * inside)
        if len(masses) < 2:
            known = not math.isnan(self.negative_mass_error)
            return masses.sum(0), torch.full_like(masses.sum(0), 0.0 if known else math.nan)
        return masses.mean(0), masses.std(0) / math.sqrt(len(masses))


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of an operator."""

    value: Tensor
    """(size,), on the operator's device, in its dtype."""
    standard_error: Tensor
    """(size,): of each entry, from the scatter of the probes. NaN from one probe, 0 if exact."""
    products: int
    """Operator products spent, one a probe."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """The errors are within their tolerance, as a whole."""
        return self.outcome is Outcome.CONVERGED


@dataclass(frozen=True)
class FrobeniusNorm:
    """‖A‖_F of an operator."""

    value: float
    standard_error: float
    """Of `value`, from the scatter of the probes. NaN from one probe, 0 if exact."""
    products: int
    """Operator products spent, one a probe."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """The standard error is within its tolerance."""
        return self.outcome is Outcome.CONVERGED
