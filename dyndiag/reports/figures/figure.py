"""What a chart is, as plain data, and the parts that charts share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Estimates, Series
from dyndiag.reports.thinning import BUCKETS, Floats, bucket_medians, noisy, running_median

COLOURS = ("s1", "s2", "s3", "s4")
MEDIAN = "; thick: median of 11 "


@dataclass(frozen=True)
class Drawn:
    """A series as a chart needs it; `lower`, `upper`, `status` where it has an interval."""

    name: str
    series: Series
    lower: Floats | None = None
    upper: Floats | None = None
    status: str | None = None
    columns: bool = False
    """For a heat map: the largest of each column is enough."""


@dataclass(frozen=True)
class Mark:
    """`type`: line, steps, rule, est, band, points, rows, lanes, violins; the rest by type."""

    type: str
    series: str | None = None
    label: str | None = None
    cls: str | None = None
    dash: str | None = None
    smooth: str | None = None
    y: float | None = None
    include: bool | None = None
    fmt: str | None = None
    dots: bool | None = None
    at: Sequence[tuple[float, float]] | None = None
    rows: Sequence[Mapping[str, str]] | None = None
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Note:
    """A word in a chart, at step `x` and value `y` (top of the chart without one)."""

    x: float
    text: str
    y: float | None = None
    dx: float | None = None
    dy: float | None = None
    anchor: str | None = None
    wide: bool | None = None
    """Left out where the chart is narrow."""


@dataclass(frozen=True)
class Figure:
    """One chart. `says` is read where there is no picture."""

    id: str
    title: str
    unit: str
    height: int
    marks: tuple[Mark, ...]
    data: tuple[Drawn, ...] = ()
    y: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    window: tuple[int, int] | None = None
    """Its own interval of steps, where it does not follow the shared one."""
    context: bool = False
    """Always the whole run: part of the timeline."""
    xaxis: bool = True
    notes: tuple[Note, ...] = ()
    table: bool = True
    kind: str = "steps"


def finite_of(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def wide(values: Floats, ratio: float = 20.0) -> bool:
    """Whether a logarithmic axis is called for: all positive and spread over more than `ratio`."""
    finite = finite_of(values)
    return len(finite) > 1 and bool(finite.min() > 0) and finite.max() > ratio * finite.min()


def scale(values: Floats, ratio: float = 20.0, zero: bool = False) -> dict[str, Any]:
    """Logarithmic if `wide`, else linear, from zero if asked."""
    if wide(values, ratio):
        return {"type": "log"}
    return {"min": 0} if zero else {}


def unit_text(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def log_text(y: Mapping[str, Any]) -> str:
    return "log scale" if y.get("type") == "log" else ""


def line_of(
    series: Series, label: str, cls: str, *, plain: bool = False, **more: Any
) -> tuple[Mark, tuple[Drawn, ...], str]:
    """A line with its median over it where the raw values are noisy; what to add to the unit."""
    if plain or not noisy(series.values):
        dots = True if len(series) < 60 else None
        return (
            Mark("line", series.name, label, cls, dots=dots, **more),
            (Drawn(series.name, series),),
            "",
        )
    each = len(series) > series.steps[-1] - series.steps[0]
    name, said = f"median: {series.name}", MEDIAN + ("steps" if each else "samples")
    median = Series(name, series.steps, running_median(series.values), series.rows)
    if len(series) > 3 * BUCKETS:  # a median of 11 would be as noisy, at this width
        at, middle = bucket_medians(series.steps, series.values)
        median = Series(name, at, middle, len(at))
        said = f"; thick: median of each {words.steps(len(series) // len(at))} steps"
    mark = Mark("line", series.name, label, cls, smooth=name, **more)
    return mark, (Drawn(series.name, series), Drawn(name, median)), said


def estimate_of(one: Estimates, label: str, cls: str) -> tuple[Mark, tuple[Drawn, ...]]:
    return Mark("est", one.name, label, cls), (
        Drawn(one.name, one, one.lower, one.upper, one.status),
    )


def within_window(series: Series, window: tuple[int, int] | None) -> Floats:
    return series.values if window is None else series.within(*window)


def timeline(says: str) -> Figure:
    """The lanes of events; `says` names them where there is no picture."""
    return Figure(
        "events",
        "Events",
        "",
        60,
        (Mark("lanes"),),
        says=says,
        context=True,
        xaxis=False,
        table=False,
    )


def plain_line(
    c: Contents, name: str, title: str, unit: str, label: str, *, id: str, height: int,
    cls: str = "loss", log: bool = True, says: str = "",
    window: tuple[int, int] | None = None,
) -> Figure | None:  # fmt: skip
    """One exact series on its own."""
    series = c.get(name)
    if series is None or not len(series):
        return None
    mark, data, median = line_of(series, label, cls, plain=window is not None)
    y = scale(within_window(series, window), ratio=3.0) if log else {}
    unit = unit_text(unit, log_text(y)) + median
    return Figure(id, title, unit, height, (mark,), data, y, says=says, window=window)


def largest_of(name: str, parts: Sequence[Series]) -> Series:
    """At each step the largest of several series."""
    steps = np.concatenate([one.steps for one in parts])
    values = np.concatenate([one.values for one in parts])
    if len(parts) > 1:
        order = np.lexsort((-np.where(np.isnan(values), -np.inf, values), steps))
        steps, values = steps[order], values[order]
        keep = np.r_[True, steps[1:] != steps[:-1]]
        steps, values = steps[keep], values[keep]
    return Series(name, steps, values, parts[0].rows)


def range_of(values: Floats) -> tuple[float, float]:
    finite = finite_of(values)
    return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)
