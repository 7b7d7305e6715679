"""Sharpness, its threshold, the edge ratio, the trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Estimates, Series
from dyndiag.reports.figures.figure import (
    Drawn,
    Figure,
    Mark,
    Note,
    estimate_of,
    line_of,
    log_text,
    range_of,
    scale,
    unit_text,
    within_window,
)


def formula(c: Contents) -> str:
    """The threshold as a formula where it is one of plain or heavy-ball descent, else a word."""
    optimizer = c.metadata.get("optimizer")
    if not isinstance(optimizer, Mapping) or optimizer.get("class") != "SGD":
        return "threshold"
    groups = [group for group in optimizer.get("groups") or () if isinstance(group, Mapping)]
    if any(g.get("nesterov") or g.get("dampening") or g.get("weight_decay") for g in groups):
        return "threshold"
    momenta = {float(group.get("momentum") or 0) for group in groups}
    if momenta == {0.0}:
        return "2/η"
    return "2(1+β)/η" if len(momenta) == 1 else "threshold"


def main_sharpness(c: Contents) -> Estimates | Series | None:
    """The sharpness that is compared with the threshold: preconditioned where there is one."""
    return c.get("curvature/preconditioned_sharpness") or c.get("curvature/sharpness")


def edge_ratio(
    c: Contents,
    id: str = "edge",
    height: int = 118,
    window: tuple[int, int] | None = None,
    context: bool = False,
    xaxis: bool = True,
) -> Figure | None:
    """From zero, or logarithmic; the edge as a rule at 1."""
    one = c.get("stability/edge_ratio")
    if one is None or not len(one) or not len(within_window(one, window)):
        return None
    rule = Mark("rule", y=1.0, cls="limit", label=None)
    mark, data = (
        estimate_of(one, "edge ratio", "s1")
        if isinstance(one, Estimates)
        else line_of(one, "edge ratio", "s1", plain=True)[:2]
    )
    y = scale(within_window(one, window), zero=window is None)
    below = formula(c)
    unit = unit_text(
        f"{sharpness_name(c)} ÷ {f'({below})' if below != 'threshold' else below}"
        + ("" if window else "; 1 is the edge of stability"),
        log_text(y),
    )
    note = (Note(c.first + 0.04 * (c.last - c.first), "the edge", 1.0, dy=-6),) if context else ()
    low, high = range_of(one.values)
    return Figure(
        id, "Edge ratio", unit if window is None else log_text(y), height, (rule, mark), data, y,
        says=f"Between {words.number(low)} and {words.number(high)}; 1 is the edge of stability.",
        window=window, context=context, xaxis=xaxis, notes=note,
    )  # fmt: skip


def is_preconditioned(c: Contents) -> bool:
    return c.get("curvature/preconditioned_sharpness") is not None


def sharpness_name(c: Contents) -> str:
    """What `main_sharpness` is called."""
    return "preconditioned sharpness" if is_preconditioned(c) else "sharpness"


def sharpness(
    c: Contents, id: str = "sharp", height: int = 290, window: tuple[int, int] | None = None
) -> Figure | None:
    """Sharpness against its threshold, with the rates named on it."""
    one = main_sharpness(c)
    if one is None or not len(one):
        return None
    label = sharpness_name(c)
    mark, data = (
        estimate_of(one, label, "s1")
        if isinstance(one, Estimates)
        else line_of(one, label, "s1", plain=True)[:2]
    )
    marks, shown = [mark], list(data)
    notes: tuple[Note, ...] = ()
    limit = c.get("stability/threshold")
    values = within_window(one, window)
    if limit is not None and len(limit):
        text = formula(c) if window else f"threshold {formula(c)}".removesuffix(" threshold")
        marks.insert(0, Mark("steps", limit.name, text, "limit", hi=held(c, limit)))
        shown.append(Drawn(limit.name, limit))
        values = np.concatenate([values, within_window(limit, window)])
        notes = _rates(c, limit) if window is None else ()
    y = scale(values, zero=window is None)
    title = "Sharpness" if window else capital_title(label, limit is not None)
    unit = unit_text(
        "1 / learning rate" if is_preconditioned(c) else "loss per squared parameter", log_text(y)
    )
    low, high = range_of(one.values)
    return Figure(
        id, title, unit, height, tuple(marks), tuple(shown), y,
        says=f"{words.capital(label)} lay between {words.number(low)} and {words.number(high)}.",
        window=window, notes=notes,
    )  # fmt: skip


def held(c: Contents, limit: Series) -> int:
    """The last step for which the last threshold stands: until the learning rate changes."""
    last = int(limit.steps[-1])
    return next((step - 1 for step, _ in rates(c) if step > last), c.last)


def capital_title(label: str, against: bool) -> str:
    return words.capital(label) + (" against its threshold" if against else "")


def rates(c: Contents) -> list[tuple[int, float]]:
    """Steps at which the learning rate changed, with the rate from there on."""
    series = c.series.get("train/learning_rate")
    if series is None or not len(series):
        return []
    change = np.flatnonzero(np.r_[True, series.values[1:] != series.values[:-1]])
    return [(int(series.steps[i]), float(series.values[i])) for i in change]


def _rates(c: Contents, limit: Series) -> tuple[Note, ...]:
    changes = rates(c)
    if not 1 <= len(changes) <= 4:
        return ()
    notes = []
    for (step, rate), (until, _) in pairwise([*changes, (c.last + 1, math.nan)]):
        there = limit.within(step, until - 1)  # a threshold of another rate is not this one's
        if len(there) and math.isfinite(there[0]):
            at = float(max(step, c.first))
            notes.append(Note(at, f"η = {words.plain(rate)}", float(there[0]), dx=6, dy=-8))
    return tuple(notes)


def trace(c: Contents, id: str = "trace") -> Figure | None:
    one = c.get("curvature/trace")
    if one is None or not len(one):
        return None
    ends = [one.lower, one.upper] if isinstance(one, Estimates) else []
    y = scale(np.concatenate([one.values, *ends]))
    unit = unit_text("loss per squared parameter", log_text(y))
    if not isinstance(one, Estimates):
        mark, data, _ = line_of(one, "trace", "s3", plain=True)
    else:
        mark, data = (
            Mark("band", one.name, "trace", "s3"),
            (Drawn(one.name, one, one.lower, one.upper, one.status),),
        )
        unit += "; band: 95 % interval over the probes"
    return Figure(
        id, "Hessian trace", unit, 140, (mark,), data, y, says="The sum of all eigenvalues."
    )
