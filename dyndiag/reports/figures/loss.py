"""The training loss."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Series
from dyndiag.reports.figures.figure import (
    Figure,
    Note,
    finite_of,
    line_of,
    log_text,
    scale,
    unit_text,
    within_window,
)


def loss_unit(c: Contents) -> str:
    """What the loss is, as far as the run tells."""
    name = str(c.metadata.get("loss_function") or "")
    low = name.lower().replace("_", "").replace(" ", "")
    if "crossentropy" in low or "nll" in low:
        return "cross-entropy in nats"
    if "mse" in low:
        return "mean squared error"
    return ""


def loss(
    c: Contents,
    id: str = "loss",
    height: int = 112,
    window: tuple[int, int] | None = None,
    context: bool = False,
    xaxis: bool = True,
    notes: tuple[Note, ...] = (),
) -> Figure | None:
    """Logarithmic; linear if a value is not positive, or if there is hardly a difference."""
    series = c.loss
    if series is None:
        return None
    mark, data, median = line_of(series, "loss", "loss", plain=window is not None)
    y = scale(within_window(series, window), ratio=3.0)
    unit = unit_text(loss_unit(c), log_text(y)) + median
    return Figure(
        id, "Loss", unit.removeprefix("; "), height, (mark,), data, y,
        says=f"The loss went from {words.number(first(series))} to {words.number(final(series))}.",
        window=window, context=context, xaxis=xaxis, notes=notes,
    )  # fmt: skip


def first(series: Series) -> float:
    """The first finite value; NaN if there is none."""
    finite = finite_of(series.values)
    return float(finite[0]) if len(finite) else math.nan


def final(series: Series, window: int = 20) -> float:
    """Median of the last `window` finite values; NaN if there is none."""
    finite = finite_of(series.values)
    return float(np.median(finite[-window:])) if len(finite) else math.nan
