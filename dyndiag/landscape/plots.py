"""Pictures of lines, planes and paths, by matplotlib, without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyndiag.errors import DyndiagError
from dyndiag.landscape.paths import LinearPath
from dyndiag.landscape.saved import Floats
from dyndiag.landscape.slices import Line, Plane

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE = 30.0
"""Losses whose greatest is more than so many times the least are drawn on a logarithmic axis."""
_LEVELS = 24
_COLOURS = ("#1f6fb4", "#c8553d", "#3b8c5a", "#8a5fb0", "#b58a1b")
_GREY = "#6b6b6b"


def plot(
    what: Line | Plane | LinearPath | Sequence[Line] | Sequence[LinearPath],
    path: str | os.PathLike[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draws it, writes a PNG (or what the ending of `path` says), and returns the Figure.

    A plane: contours, the model as a star, the trajectory of its checkpoints. A path: the loss
    between the two ends, the barrier over the line between them, accuracy if there is any. Several
    lines or several paths are laid over each other, by their `labels`. What is NaN or inf is a gap,
    marked at the edge. Loss axes are logarithmic where the greatest is over 30 times the least.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes 0.3 s to import
    from matplotlib.figure import Figure

    several = list(what) if isinstance(what, list | tuple) else [what]
    if labels is not None and len(labels) != len(several):
        raise DyndiagError(f"labels must name each of the {len(several)}, but {len(labels)} came")
    figure = Figure(figsize=(6.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(several) == 1 and isinstance(several[0], Plane):
        _plane(figure, axes, several[0])
    elif several and all(isinstance(one, Line) for one in several):
        _lines(axes, several, labels)
    elif several and all(isinstance(one, LinearPath) for one in several):
        _paths(axes, several, labels)
    else:
        kinds = sorted({type(one).__name__ for one in several})
        raise DyndiagError(
            "plot takes a Plane, one or more Lines, or one or more LinearPaths, but it got "
            f"{' and '.join(kinds) or 'nothing'}"
        )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _lines(axes: Any, lines: Sequence[Any], labels: Sequence[str] | None) -> None:
    _loss_axis(axes, np.concatenate([line.losses for line in lines]))
    for i, line in enumerate(lines):
        label = labels[i] if labels else None
        _curve(axes, line.coordinates, line.losses, _COLOURS[i % len(_COLOURS)], label)
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.text(
        0.0,
        1.01,
        "model",
        transform=axes.get_xaxis_transform(),
        ha="center",
        fontsize=8,
        color=_GREY,
    )
    names = list(dict.fromkeys(line.label for line in lines))
    axes.set_xlabel(f"coordinate along: {names[0] if len(names) == 1 else 'each direction'}")
    if labels:
        axes.legend(frameon=False, fontsize=9)


def _paths(axes: Any, paths: Sequence[Any], labels: Sequence[str] | None) -> None:
    logarithmic = _loss_axis(axes, np.concatenate([path.losses for path in paths]))
    for i, path in enumerate(paths):
        colour = _COLOURS[i % len(_COLOURS)]
        name = f"{labels[i]}: " if labels else ""
        label = f"{name}barrier {path.barrier:.3g}"
        _curve(axes, path.alphas, path.losses, colour, label)
        axes.plot(path.alphas, path.chord, color=colour, linewidth=1, linestyle="--", alpha=0.7)
        if np.isfinite(path.barrier) and path.barrier > 0:
            top = int(path.heights.argmax())
            _arrow(axes, path.alphas[top], path.chord[top], path.losses[top], colour, logarithmic)
    recomputed = any(path.recomputed_batchnorm for path in paths)
    axes.set_xlabel(f"α in (1−α)·a + α·b{', BatchNorm statistics recomputed' * recomputed}")
    axes.set_xlim(-0.02, 1.02)
    handles, told = axes.get_legend_handles_labels()
    if len(paths) == 1 and paths[0].accuracies is not None:
        right = axes.twinx()
        right.plot(paths[0].alphas, paths[0].accuracies, color=_COLOURS[2], linewidth=1.2)
        right.set_ylabel("accuracy", color=_COLOURS[2])
        right.tick_params(axis="y", colors=_COLOURS[2])
        right.set_ylim(-0.02, 1.02)
        right.spines["top"].set_visible(False)
    axes.legend(
        handles, told, frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(paths), 3),
    )  # fmt: skip


def _plane(figure: Any, axes: Any, plane: Plane) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    losses = np.ma.masked_invalid(plane.losses)
    axes.set_facecolor("#d9d9d9")
    if losses.count() < 4 or min(losses.shape) < 2:
        raise DyndiagError("fewer than four losses of this plane are finite: there are no contours")
    low, high = float(losses.min()), float(losses.max())
    if high <= low:  # a plain: one colour, and no lines
        low, high = low - 0.5, high + 0.5
    logarithmic = low > 0 and high > _WIDE * low
    spread = np.geomspace if logarithmic else np.linspace
    levels = spread(low, high, _LEVELS)
    levels[-1] = max(levels[-1], high)
    levels[0] = min(levels[0], low)
    norm = (LogNorm if logarithmic else Normalize)(low, high)
    filled = axes.contourf(plane.x, plane.y, losses, levels=levels, norm=norm, cmap="viridis")
    drawn = levels[1:-1:3]
    lines = axes.contour(
        plane.x,
        plane.y,
        losses,
        levels=drawn,
        colors=["white" if norm(level) < 0.6 else "black" for level in drawn],
        linewidths=0.6,
        alpha=0.8,
    )
    axes.clabel(lines, fontsize=6.5, fmt=lambda value: f"{value:.3g}")
    ticks = levels[:: max(1, _LEVELS // 6)]
    bar = figure.colorbar(filled, ax=axes, label="loss", ticks=ticks)
    bar.ax.minorticks_off()
    bar.ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    if plane.trajectory is not None:
        _trajectory(axes, plane.trajectory)
    axes.plot(0, 0, marker="*", markersize=13, color="white", markeredgecolor="black", zorder=5)
    if losses.mask.any():
        axes.set_title("grey: NaN or inf", fontsize=8, color=_GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(plane.labels[0])
    axes.set_ylabel(plane.labels[1])
    axes.set_xlim(plane.x[0], plane.x[-1])
    axes.set_ylim(plane.y[0], plane.y[-1])
    lengths = np.ptp(plane.x) * plane.norms[0], np.ptp(plane.y) * plane.norms[1]
    if max(lengths) < 2 * min(lengths) and np.isclose(*plane.norms, rtol=0.2):
        axes.set_aspect("equal")


def _trajectory(axes: Any, track: Floats) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot(
        track[:, 0], track[:, 1], color="#ff9d5c", linewidth=1.4, marker="o", markersize=3.5,
        markeredgecolor="black", markeredgewidth=0.4, zorder=4,
    )  # fmt: skip
    word = axes.annotate("start", track[0], xytext=(5, 5), textcoords="offset points", fontsize=8)
    word.set(color="white", path_effects=[withStroke(linewidth=2, foreground="black")])


def _curve(axes: Any, x: Floats, losses: Floats, colour: str, label: str | None) -> None:
    finite = np.isfinite(losses)
    shown = np.where(finite, losses, np.nan)
    axes.plot(
        x, shown, color=colour, linewidth=1.8, label=label, marker="o" if len(x) <= 60 else None,
        markersize=3,
    )  # fmt: skip
    if not finite.all():
        axes.plot(
            x[~finite], np.full((~finite).sum(), 0.98), color=colour, marker="x", linestyle="none",
            markersize=5, transform=axes.get_xaxis_transform(), label="NaN or inf",
        )  # fmt: skip


def _arrow(axes: Any, x: float, low: float, high: float, colour: str, logarithmic: bool) -> None:
    if logarithmic and low <= 0:
        return
    axes.annotate(
        "", xy=(x, high), xytext=(x, low),
        arrowprops={"arrowstyle": "<->", "color": colour, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip


def _loss_axis(axes: Any, losses: Floats) -> bool:
    """Labels and spines; whether the axis is logarithmic."""
    finite = losses[np.isfinite(losses)]
    logarithmic = bool(finite.size and finite.min() > 0 and finite.max() > _WIDE * finite.min())
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        decades = np.log10(finite.max() / finite.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 4 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return logarithmic
