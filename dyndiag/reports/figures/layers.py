"""Gradients and updates, whole and by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Series
from dyndiag.reports.figures.figure import (
    Drawn,
    Figure,
    Mark,
    finite_of,
    largest_of,
    line_of,
    log_text,
    scale,
    unit_text,
    within_window,
)

MOST_ROWS = 48


def gradient_norm(
    c: Contents, id: str = "gradient", height: int = 150, window: tuple[int, int] | None = None
) -> Figure | None:
    """The norm before clipping, and dashed the one after it."""
    before, after = c.series.get("gradients/norm"), c.series.get("gradients/norm_clipped")
    if before is None and after is None:
        return None
    marks: list[Mark] = []
    data: list[Drawn] = []
    median = ""
    values = []
    if before is not None:
        mark, shown, median = line_of(
            before, "before clipping" if after is not None else "gradient norm", "loss",
            plain=window is not None,
        )  # fmt: skip
        marks.append(mark)
        data.extend(shown)
        values.append(within_window(before, window))
    if after is not None:
        mark, shown, _ = line_of(after, "after clipping", "limit", plain=not median, dash="dash")
        marks.append(mark)
        data.extend(shown)
        values.append(within_window(after, window))
    y = scale(np.concatenate(values), ratio=3.0)
    return Figure(
        id, "Gradient norm", unit_text("L2, whole model", log_text(y)) + median, height,
        tuple(marks), tuple(data), y, window=window, says="L2 norm of the step's gradient.",
    )  # fmt: skip


def heat(c: Contents, prefix: str, title: str, unit: str, id: str) -> Figure | None:
    """A row for each module, in forward order; more than 48 are joined by the names they share."""
    modules = c.parts.get(prefix, ())
    rows = joined(c, prefix, modules)
    values = [finite_of(row.values) for row in rows]
    present = np.concatenate(values) if values else np.empty(0)
    positive = present[present > 0]
    if not len(positive):
        return None
    lo, hi = (float(v) for v in np.log10(np.quantile(positive, [0.01, 0.995])))
    if hi - lo < 0.1:
        lo, hi = lo - 0.05, hi + 0.05
    mark = Mark(
        "rows",
        rows=tuple({"label": row.name.split(":", 1)[1], "series": row.name} for row in rows),
        lo=lo,
        hi=hi,
    )
    joint = "" if len(rows) == len(modules) else f"; {len(modules)} modules joined by name"
    return Figure(
        id, title, unit_text(unit, f"log scale, largest within each column{joint}"),
        34 + 19 * len(rows), (mark,), tuple(Drawn(row.name, row, columns=True) for row in rows),
        says=f"{words.count(len(rows), 'row')}, one a module.",
    )  # fmt: skip


def by_part(
    c: Contents, quantity: str, names: Sequence[str], title: str, unit: str, id: str
) -> Figure | None:
    """A quantity told by module: a heat map where it is positive and spreads over decades, else
    the largest and the smallest of all modules, and the whole where it is there."""
    parts = [c.series[name] for name in names]
    values = finite_of(np.concatenate([part.values for part in parts]))
    if not len(values) or max(len(part) for part in parts) < 2:
        return None
    if len(parts) > 2 and bool(values.min() > 0) and values.max() > 10 * values.min():
        return heat(c, f"{quantity}/", title, unit, id)
    opposite = [Series(part.name, part.steps, -part.values, part.rows) for part in parts]
    low = largest_of(f"smallest: {quantity}", opposite)
    lines = [
        ("largest", "s2", largest_of(f"largest: {quantity}", parts)),
        ("smallest", "s4", Series(low.name, low.steps, -low.values, low.rows)),
    ]
    whole = c.get(quantity)
    if whole is not None and len(whole):
        lines.insert(0, ("whole model", "loss", whole))
    if len(parts) == 1:
        lines = [*lines[:-2], (names[0].removeprefix(f"{quantity}/"), "s2", parts[0])]
    marks = tuple(Mark("line", one.name, label, cls) for label, cls, one in lines)
    y = scale(np.concatenate([one.values for *_, one in lines]))
    among = f"largest and smallest of {len(parts)} parts" if len(parts) > 1 else ""
    return Figure(
        id, title, unit_text(unit, among, log_text(y)), 120, marks,
        tuple(Drawn(one.name, one) for *_, one in lines), y,
        says=f"{title} by part.",
    )  # fmt: skip


def joined(c: Contents, prefix: str, modules: Sequence[str]) -> list[Series]:
    """The modules' series, named `prefix:module`; where there are too many, the largest value of
    the modules that share the first parts of their names."""
    depth = max((module.count(".") + 1 for module in modules), default=1)
    groups: dict[str, list[str]] = {}
    while depth:
        groups = {}
        for module in modules:
            groups.setdefault(".".join(module.split(".")[:depth]), []).append(module)
        if len(groups) <= MOST_ROWS:
            break
        depth -= 1
    out = []
    for group, members in list(groups.items())[:MOST_ROWS]:
        all_of = [c.series[prefix + member] for member in members if prefix + member in c.series]
        out.append(largest_of(f"{prefix}:{group}", all_of))
    return out
