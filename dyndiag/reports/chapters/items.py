"""What a chapter is made of: plain data, each kind with its place in the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dyndiag.reports import words
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


def gaps(absent: Mapping[str, Absent], names: Sequence[str]) -> list[Item]:
    """What is absent of `names`; those with the same reason in one place."""
    found = [absent[name] for name in names if name in absent]
    together: dict[tuple[str, str], list[str]] = {}
    for one in found:
        together.setdefault((one.why, one.line), []).append(one.what)
    return [
        Absent(words.capital(words.listing([what[0].lower() + what[1:] for what in several])), *key)
        for key, several in together.items()
    ]


def charts(figures: Sequence[Figure | None]) -> list[Item]:
    """Those figures that there is data for."""
    return [Chart(figure) for figure in figures if figure is not None]
