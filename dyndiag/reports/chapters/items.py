"""What a chapter is made of: plain data, each kind with its place in the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyndiag.reports.figures import Figure


@dataclass(frozen=True)
class Absent:
    """Something that was not measured: what, why, and the line that would turn it on."""

    what: str
    why: str
    line: str = ""
    kind: str = "absent"


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Chart:
    figure: Figure
    kind: str = "chart"


@dataclass(frozen=True)
class Table:
    """Rows of text; `numeric` says which columns are aligned to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    colours: tuple[str, ...] = ()
    """A colour's class for each row, where rows are keyed to a chart."""
    kind: str = "table"


@dataclass(frozen=True)
class Metrics:
    """Large numbers: (value, name, what to know about it)."""

    values: tuple[tuple[str, str, str], ...]
    kind: str = "metrics"


@dataclass(frozen=True)
class Shares:
    """One bar to scale: (name, share of it, colour's class)."""

    parts: tuple[tuple[str, float, str], ...]
    kind: str = "shares"


@dataclass(frozen=True)
class Facts:
    """Pairs of name and text, in two columns."""

    columns: tuple[tuple[tuple[str, str], ...], ...]
    kind: str = "facts"


Item = Absent | Text | Chart | Table | Metrics | Shares | Facts


@dataclass(frozen=True)
class Chapter:
    id: str
    title: str
    entry: str
    """Its name in the list of contents."""
    lead: str
    items: tuple[Item, ...]
    empty: bool = False
    """Nothing was measured: the list of contents says so."""


def charts(figures: Sequence[Figure | None]) -> list[Item]:
    """Those figures that there is data for."""
    return [Chart(figure) for figure in figures if figure is not None]
