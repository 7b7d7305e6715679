"""The Hessian's spectrum, over time and at one step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Density
from dyndiag.reports.figures.figure import Drawn, Figure, Mark
from dyndiag.reports.figures.stability import formula, held, is_preconditioned
from dyndiag.reports.thinning import Floats


def spectrum(c: Contents, id: str = "spectrum") -> Figure | None:
    """A half violin at each sample of the density."""
    if not c.densities:
        return None
    grid, linear = density_grid(c)
    marks = [Mark("violins")]
    data: list[Drawn] = []
    limit = c.get("stability/threshold")
    if limit is not None and len(limit) and not is_preconditioned(c):
        marks.append(
            Mark(
                "steps",
                limit.name,
                f"threshold {formula(c)}".removesuffix(" threshold"),
                "limit",
                hi=held(c, limit),
            )
        )
        data.append(Drawn(limit.name, limit))
    y = {"type": "symlog", "c": linear, "min": float(grid[0]), "max": float(grid[-1]), "hard": True}
    return Figure(
        id, "Spectrum over time", "eigenvalue, symmetric log scale; width: log density; "
        "ticks: the sharpness", 280, tuple(marks), tuple(data), y, table=False,
        says=f"{words.count(len(c.densities), 'sample')} of the spectral density.",
    )  # fmt: skip


def density(c: Contents, id: str = "density") -> Figure | None:
    if not c.densities:
        return None
    return Figure(
        id, "Density at one step",
        "mass per decade of this axis, log scale; band: smallest to largest of the probes", 170, (),
        kind="density", table=False, says="Most of the mass lies near zero.",
    )  # fmt: skip


def density_grid(c: Contents) -> tuple[Floats, float]:
    """One grid for all samples, even on the symmetric log axis, and that axis's linear part.

    It ends where no sample has mass left, or at the largest threshold.
    """
    samples = c.densities
    reach = max(float(np.abs(s.nodes if len(s.nodes) else s.grid).max()) for s in samples)
    linear = 1e-3 * reach or 1.0
    ends: list[float] = []
    for s in samples:
        inside = s.nodes if len(s.nodes) else s.grid[s.mean * _per_decade(s.grid, linear) > 1e-4]
        ends += [float(inside.min()), float(inside.max())] if len(inside) else []
    limit = None if is_preconditioned(c) else c.get("stability/threshold")
    if limit is not None and np.isfinite(limit.values).any():
        ends.append(min(float(np.nanmax(limit.values)), 10 * reach))
    low, high = np.arcsinh(np.array([min(ends, default=-reach), max(ends, default=reach)]) / linear)
    margin = 0.05 * (high - low) or 1.0
    return linear * np.sinh(np.linspace(low - margin, high + margin, 220)), linear


def _per_decade(grid: Floats, linear: float) -> Floats:
    """What turns a density per unit into one per decade of the symmetric log axis."""
    return np.asarray(math.log(10) * np.sqrt(grid**2 + linear**2))


def _decades(values: Floats, linear: float) -> Floats:
    return np.asarray(np.arcsinh(values / linear) / math.log(10))


def probes_of(s: Density) -> list[tuple[Floats, Floats]]:
    """The quadrature's nodes and weights, probe by probe, each with mass 1; empty if the order of
    the nodes does not tell the probes apart. Within a probe nodes ascend."""
    if not len(s.nodes):
        return []
    cuts = np.flatnonzero(np.diff(s.nodes) < 0) + 1
    parts = list(zip(np.split(s.nodes, cuts), np.split(s.weights, cuts), strict=True))
    masses = np.array([weights.sum() for _, weights in parts])
    if masses.min() <= 0 or masses.max() > 1.001 * masses.min():
        return []
    return [(nodes, weights / weights.sum()) for nodes, weights in parts]


def _curves(s: Density, grid: Floats, linear: float) -> tuple[Floats, Floats, Floats]:
    """Mean, smallest and largest density over the probes, per decade of the symmetric log axis.

    From the nodes, smoothed on this axis: a kernel of one width in eigenvalues would draw humps
    around zero that are not there. From the kept density where there are no nodes.
    """
    parts = probes_of(s)
    if not parts:
        mean = np.interp(grid, s.grid, s.mean, left=0, right=0) * _per_decade(grid, linear)
        half = np.interp(grid, s.grid, s.half, left=0, right=0) * _per_decade(grid, linear)
        return mean, np.maximum(0, mean - half), mean + half
    at = _decades(grid, linear)
    width = 0.008 * (at[-1] - at[0])
    curves = np.stack(
        [
            np.exp(-0.5 * ((at[:, None] - _decades(nodes, linear)) / width) ** 2) @ weights
            for nodes, weights in parts
        ]
    ) / (width * math.sqrt(2 * math.pi))
    return curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)


def density_data(c: Contents) -> dict[str, Any] | None:
    """The samples on one grid, as mass per decade of the symmetric log axis; at most 120."""
    if not c.densities:
        return None
    chosen = np.unique(np.linspace(0, len(c.densities) - 1, 120).astype(int))
    grid, linear = density_grid(c)
    limit = None if is_preconditioned(c) else c.get("stability/threshold")
    top = c.get("curvature/sharpness")
    out = []
    for s in (c.densities[i] for i in chosen):
        mean, low, high = _curves(s, grid, linear)
        out.append(
            {
                "step": s.step,
                "mean": _short(mean),
                "lo": _short(low),
                "hi": _short(high),
                "limit": _or_none(limit.at(s.step) if limit is not None else math.nan),
                "top": _or_none(top.at(s.step) if top is not None else math.nan),
                "says": _masses(s),
            }
        )
    return {"c": linear, "grid": _short(grid), "samples": out}


def _masses(s: Density) -> str:
    if not len(s.nodes):
        return ""
    largest = float(np.max(np.abs(s.nodes)))
    total = float(np.sum(s.weights)) or 1.0
    below = float(np.sum(s.weights[s.nodes < -1e-3 * largest])) / total
    near = float(np.sum(s.weights[np.abs(s.nodes) <= 1e-3 * largest])) / total
    return f": {words.percent(below, 1)} of the mass below zero, {words.percent(near, 1)} near it"


def _short(values: Floats) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
