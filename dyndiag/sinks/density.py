"""A spectral density as a small picture."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Axes:
    """Where the axes of every picture of a run end, so that one can be laid over another."""

    reach: float
    """Eigenvalues from −reach to reach; logarithmic, but for a ten-thousandth of it around 0."""
    top: float
    """Densities from a ten-millionth of top to top; logarithmic."""


def axes_for(density: NDArray[Any]) -> Axes:
    """Axes for a first density, (3, G), with a decade to spare for what comes later."""
    grid, mean, _ = density
    return Axes(reach=_decade_above(np.abs(grid)), top=_decade_above(mean))


def draw(density: NDArray[Any], axes: Axes, title: str) -> bytes:
    """A PNG of 320 × 240 pixels.

    `density`: (3, G), grid, mean density and half-width over the probes. The title says so where
    the spectrum goes beyond the axes. About 35 ms, and 0.3 s for the first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes 0.3 s to import
    from matplotlib.figure import Figure

    grid, mean, half_width = np.asarray(density, dtype=np.float64)
    beyond = bool(np.any(np.abs(grid) > axes.reach))
    bottom = axes.top * 1e-7
    figure = Figure(figsize=(3.2, 2.4), dpi=100)
    plot = figure.add_axes(
        (0.2, 0.19, 0.72, 0.71),
        xlim=(-axes.reach, axes.reach),
        ylim=(bottom, axes.top),
    )
    plot.set_xscale("symlog", linthresh=axes.reach * 1e-4)
    plot.set_yscale("log")
    # Few ticks and plain words: finding and typesetting matplotlib's own takes 100 ms more.
    ticks = [axes.reach * share for share in (-1, -1e-2, 0, 1e-2, 1)]
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    ticks = [axes.top * 10.0**-power for power in (6, 4, 2, 0)]
    plot.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    plot.minorticks_off()
    plot.set_title(title + ", goes beyond the axis" * beyond, fontsize=8)
    plot.set_xlabel("eigenvalue", fontsize=8)
    plot.set_ylabel("density", fontsize=8)
    low, high = (np.maximum(mean + side * half_width, bottom) for side in (-1, 1))
    plot.fill_between(grid, low, high, color="tab:blue", alpha=0.3, linewidth=0)
    plot.plot(grid, np.maximum(mean, bottom), color="tab:blue", linewidth=1)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)  # type: ignore[no-untyped-call]
    return png.getvalue()


def _decade_above(values: NDArray[Any]) -> float:
    finite = values[np.isfinite(values) & (values > 0)]
    return 10.0 ** (math.ceil(math.log10(finite.max())) + 1) if finite.size else 1.0
