"""Curvature of a training loss: numerics only, no word of training.

`hessian(model, loss_fn, data)` gives an operator; `eigenpairs`, `trace` and `spectral_density` read
it through products alone, so any symmetric `Operator` will do.
"""

from __future__ import annotations

from dyndiag.curvature.density import spectral_density
from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.hessian import LossHessian, hessian, loss_hessian
from dyndiag.curvature.operator import Operator, negated, scaled
from dyndiag.curvature.results import Eigenpairs, Outcome, SpectralDensity, Trace
from dyndiag.curvature.trace import trace

__all__ = [
    "Eigenpairs",
    "LossHessian",
    "Operator",
    "Outcome",
    "SpectralDensity",
    "Trace",
    "eigenpairs",
    "hessian",
    "loss_hessian",
    "negated",
    "scaled",
    "spectral_density",
    "trace",
]
