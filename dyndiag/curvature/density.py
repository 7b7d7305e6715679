"""The spectral density, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from dyndiag.curvature.draws import fixed_generator, gaussian
from dyndiag.curvature.lanczos import Floats, Lanczos
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.results import Outcome, SpectralDensity
from dyndiag.errors import DyndiagError

_GRID = 1001
_WIDTHS_IN_SPREAD = 200
_MARGIN = 5
"""Kernel widths that the grid reaches beyond the outermost nodes: nothing is cut off."""


def spectral_density(
    operator: Operator,
    *,
    probes: int = 4,
    steps: int = 30,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """φ(t) = (1/size) Σᵢ δ(t − λᵢ), by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    A probe's T = S Θ Sᵀ gives nodes θⱼ with weights (e₁ᵀsⱼ)², which sum to one and whose distance
    (Wasserstein-1) from the probe's own measure is at most π · spread / (4 · steps). The band
    between the probes' lowest and highest density shows what the draw of the probes may change; the
    weight of a single outlier is right on average only: take outliers from `eigenpairs`.

    Without a `generator`, the same answer at every call. Cost: probes · steps products; memory
    steps · size numbers, one probe at a time.
    """
    if probes < 1 or steps < 1:
        raise DyndiagError(f"probes and steps must be at least 1, but are {probes} and {steps}")
    generator = generator or fixed_generator()
    nodes: list[Floats] = []
    weights: list[Floats] = []
    products, rounding = 0, 0.0
    outcome = Outcome.CONVERGED
    for _ in range(probes):
        run = Lanczos(operator, gaussian(operator, generator))
        for _ in range(steps):
            run.extend()
            if not run.finite or run.exhausted:
                break
        products += run.products
        if not run.finite:
            outcome = Outcome.NOT_FINITE
            break
        values, vectors = run.ritz()
        nodes.append(values)
        weights.append(vectors[0] ** 2)
        rounding = max(rounding, run.rounding(values))
    return _summary(nodes, weights, rounding, products, outcome)


def _summary(
    nodes: list[Floats], weights: list[Floats], rounding: float, products: int, outcome: Outcome
) -> SpectralDensity:
    """NaN throughout if not even the first probe stayed finite."""
    finished = len(nodes)
    grid, width, curves = np.full(_GRID, np.nan), math.nan, np.full((1, _GRID), np.nan)
    negative = np.full(1, np.nan)
    if finished:
        low, high = min(map(np.min, nodes)), max(map(np.max, nodes))
        # One point of mass has no spread: its own size, or 1 for the zero matrix, is the scale.
        spread = high - low if high - low > rounding else max(abs(high), abs(low)) or 1.0
        width = spread / _WIDTHS_IN_SPREAD
        grid = np.linspace(low - _MARGIN * width, high + _MARGIN * width, _GRID)
        curves = np.stack([_smooth(n, w, grid, width) for n, w in zip(nodes, weights, strict=True)])
        # A node at −rounding stands for zero.
        negative = np.array([w[n < -rounding].sum() for n, w in zip(nodes, weights, strict=True)])
    error = negative.std(ddof=1) / math.sqrt(finished) if finished > 1 else math.nan
    return SpectralDensity(
        grid=torch.from_numpy(grid),
        density=torch.from_numpy(curves.mean(axis=0)),
        lowest=torch.from_numpy(curves.min(axis=0)),
        highest=torch.from_numpy(curves.max(axis=0)),
        nodes=torch.from_numpy(_rows(nodes, "edge")),
        weights=torch.from_numpy(_rows(weights, "constant")),
        negative_mass=float(negative.mean()),
        negative_mass_error=float(error),
        kernel_width=float(width),
        products=products,
        outcome=outcome,
    )


def _rows(probes: list[Floats], fill: Literal["edge", "constant"]) -> Floats:
    """(probes, n). A probe that exhausted its space early repeats its last node at weight zero."""
    most = max(map(len, probes), default=0)
    rows = [np.pad(probe, (0, most - len(probe)), mode=fill) for probe in probes]
    return np.reshape(rows, (len(probes), most))


def _smooth(nodes: Floats, weights: Floats, grid: Floats, width: float) -> Floats:
    kernels = np.exp(-0.5 * ((grid[:, None] - nodes) / width) ** 2)
    smoothed: Floats = kernels @ weights / (width * math.sqrt(2 * math.pi))
    return smoothed
