"""Curvature of a training loss: numerics only, no word of training.

`hessian(model, loss_fn, data)`, `gauss_newton` and `fisher` give operators; `eigenpairs`, `trace`,
`diagonal`, `frobenius_norm` and `spectral_density` read them through products alone, so any
symmetric `Operator` will do. PyHessian's own algorithms are in `dyndiag.curvature.pyhessian`.
"""

from __future__ import annotations

from dyndiag.curvature.batch_sharpness import BatchSharpness, mean_batch_sharpness
from dyndiag.curvature.coherence import Coherence, coherence
from dyndiag.curvature.critical_learning_rate import (
    CriticalLearningRate,
    Crossing,
    critical_learning_rate,
    loss_along,
)
from dyndiag.curvature.density import spectral_density
from dyndiag.curvature.diagonal import diagonal
from dyndiag.curvature.directional import (
    batch_sharpness,
    curvature_along,
    directional_sharpness,
    realised_edge,
)
from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.fisher import Fisher, fisher
from dyndiag.curvature.frobenius import frobenius_norm
from dyndiag.curvature.gauss_newton import GaussNewton, gauss_newton
from dyndiag.curvature.generalized_sharpness import GeneralizedSharpness, generalized_sharpness
from dyndiag.curvature.gradient_flow import GradientFlowSharpness, gradient_flow_sharpness
from dyndiag.curvature.hessian import Check, Engine, LossHessian, hessian, loss_hessian
from dyndiag.curvature.neural_tangent_kernel import (
    neural_tangent_kernel,
    neural_tangent_kernel_sharpness,
)
from dyndiag.curvature.operator import Operator, block_diagonal, deflated, scaled, shifted
from dyndiag.curvature.results import (
    Diagonal,
    Eigenpairs,
    FrobeniusNorm,
    Outcome,
    SpectralDensity,
    Trace,
)
from dyndiag.curvature.trace import trace

__all__ = [
    "BatchSharpness",
    "Check",
    "Coherence",
    "CriticalLearningRate",
    "Crossing",
    "Diagonal",
    "Eigenpairs",
    "Engine",
    "Fisher",
    "FrobeniusNorm",
    "GaussNewton",
    "GeneralizedSharpness",
    "GradientFlowSharpness",
    "LossHessian",
    "Operator",
    "Outcome",
    "SpectralDensity",
    "Trace",
    "batch_sharpness",
    "block_diagonal",
    "coherence",
    "critical_learning_rate",
    "curvature_along",
    "deflated",
    "diagonal",
    "directional_sharpness",
    "eigenpairs",
    "fisher",
    "frobenius_norm",
    "gauss_newton",
    "generalized_sharpness",
    "gradient_flow_sharpness",
    "hessian",
    "loss_along",
    "loss_hessian",
    "mean_batch_sharpness",
    "neural_tangent_kernel",
    "neural_tangent_kernel_sharpness",
    "realised_edge",
    "scaled",
    "shifted",
    "spectral_density",
    "trace",
]
