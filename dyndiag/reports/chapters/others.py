"""Every series that no other chapter draws: of probes asked for, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Item, Table, Text, charts
from dyndiag.reports.contents import Contents, Series
from dyndiag.reports.figures import Figure
from dyndiag.reports.quantities import title, unit

MOST_CHARTS = 40
MOST_ROWS = 200
ELSEWHERE = {
    "train/loss", "train/learning_rate", "train/skipped", "curvature/sharpness",
    "curvature/preconditioned_sharpness", "curvature/batch_sharpness", "curvature/trace",
    "stability/threshold", "stability/edge_ratio", "stability/warmup", "stability/full_batch",
    "stability/realised_edge", "gradients/norm", "gradients/norm_clipped", "updates/ratio",
    "logits/max", "logits/log_partition", "attention/logit_max", "attention/logit_max_sampled",
    "predictions/entropy", "predictions/jsd", "predictions/instability", "predictions/loss",
    "continual/accuracy", "continual/samples", "continual/task", "continual/period",
}  # fmt: skip


def others(c: Contents) -> Chapter:
    """One chart a quantity; of single modules the largest and the smallest, or a heat map."""
    chapter_id, heading = "others", "Other signals"
    found = _quantities(c)
    if not found:
        line = "dyndiag.Monitor(…, probes=[dyndiag.probes.Activations(), …])"
        absent = Absent("Other signals", "no further probe was asked for", line)
        return Chapter(chapter_id, heading, heading, "", (absent,), True)
    drawn: list[Figure] = []
    told: list[str] = []
    for quantity, parts in found.items():
        figure = _figure(c, quantity, parts) if len(drawn) < MOST_CHARTS else None
        if figure is None:
            told.append(quantity)
        else:
            drawn.append(figure)
    items: list[Item] = charts(drawn)
    if told:
        names = [name for quantity in told for name in found[quantity]]
        more = f" (the first {MOST_ROWS} of {words.steps(len(names))})" * (len(names) > MOST_ROWS)
        items.append(Text(f"Single values, and what there was no room to draw{more}:"))
        items.append(_table(c, names[:MOST_ROWS]))
    lead = f"{words.capital(words.count(len(found), 'quantity', 'quantities'))} besides the above."
    return Chapter(chapter_id, heading, heading, lead, tuple(items))


def _quantities(c: Contents) -> dict[str, list[str]]:
    """`area/quantity` → names of its series, the whole before its parts, of what is not shown."""
    found: dict[str, list[str]] = {}
    for name in c.series:
        area, _, rest = name.partition("/")
        quantity = f"{area}/{rest.partition('/')[0]}"
        if quantity not in ELSEWHERE and area != "failures" and len(c.series[name]):
            found.setdefault(quantity, []).append(name)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts task2 before task10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _figure(c: Contents, quantity: str, names: Sequence[str]) -> Figure | None:
    id = re.sub(r"[^a-z0-9]+", "-", f"other-{quantity}".lower())
    if names == [quantity]:
        if len(c.series[quantity]) < 2:
            return None
        label = quantity.partition("/")[2].replace("_", " ")
        values = c.series[quantity].values
        return figures.plain_line(
            c, quantity, title(quantity), unit(quantity), label, id=id, height=120, cls="s1",
            log=bool(np.any(values > 1)),  # shares and probabilities are read from 0 to 1
        )  # fmt: skip
    parts = [name for name in names if name != quantity]
    return figures.by_part(c, quantity, parts, title(quantity), unit(quantity), id)


def _table(c: Contents, names: Sequence[str]) -> Table:
    rows = tuple(_row(c.series[name]) for name in names)
    head = ("series", "values", "first", "last", "smallest", "largest")
    return Table(head, rows, (False, True, True, True, True, True))


def _row(series: Series) -> tuple[str, ...]:
    finite = series.values[np.isfinite(series.values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
    shown = (series.values[0], series.values[-1], low, high)
    return series.name, str(series.rows), *(words.number(float(value)) for value in shown)
