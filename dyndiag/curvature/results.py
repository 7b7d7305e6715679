"""What the estimators return: value, doubt, cost, and why they ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Outcome(Enum):
    """Why an estimator ended, as a sentence."""

    CONVERGED = "everything asked for was reached"
    BUDGET_SPENT = "max_products came first: the bounds are wider than asked for"
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


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of a trace."""

    value: float
    standard_error: float
    """Of `value`, from the scatter of the probes. NaN from a single probe."""
    products: int
    """Operator products spent, one a probe."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """The standard error is within its tolerance."""
        return self.outcome is Outcome.CONVERGED

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The confidence interval by Student's t with one degree of freedom less than probes."""
        if self.products < 2:
            return (-math.inf, math.inf)
        from scipy.special import stdtrit  # a tenth of a second to import: only when asked for

        half = float(stdtrit(self.products - 1, (1 + confidence) / 2)) * self.standard_error
        return (self.value - half, self.value + half)


@dataclass(frozen=True)
class SpectralDensity:
    """φ(t) = (1/size) Σᵢ δ(t − λᵢ) by stochastic Lanczos quadrature. Tensors: float64, on the CPU.

    Compare two densities by their nodes and weights: the kernel is for pictures only.
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
    """(probes, n): the Ritz values of each probe, ascending."""
    weights: Tensor
    """(probes, n): the mass that each probe puts on its nodes; each row sums to 1."""
    negative_mass: float
    """Share of the eigenvalues that lies below zero."""
    negative_mass_error: float
    """Standard error of `negative_mass` over the probes. NaN from a single probe."""
    kernel_width: float
    """Standard deviation of the smoothing, in the operator's unit: spread / 200."""
    products: int
    """Operator products spent."""
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """Every probe took all its steps, or exhausted its space."""
        return self.outcome is Outcome.CONVERGED
