"""The page: the one place that knows HTML. Everything in it is escaped by the template."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import BaseLoader, Environment
from markupsafe import Markup

from dyndiag.reports import figures, thinning, words
from dyndiag.reports.chapters import chapters
from dyndiag.reports.chapters.closing import when
from dyndiag.reports.chapters.items import Chart, Table
from dyndiag.reports.contents import Contents
from dyndiag.reports.continual import starts
from dyndiag.reports.figures import Drawn, Figure
from dyndiag.reports.findings import Findings, findings
from dyndiag.reports.verdict import numbers, verdict

SCRIPTS = (
    "data", "numbers", "scales", "state", "legend", "marks", "lanes", "chart", "density", "page"
)  # fmt: skip
DATA_LIMIT = 2_400_000  # characters of series data; the page itself stays below half a million
NAME_LIMIT = 200


def page(c: Contents) -> str:
    """The whole report as one HTML text: no request, no script or style but its own."""
    found = findings(c)
    chapter_list = chapters(c)
    timeline = _timeline(c, found)
    shown = [*timeline, *(figure for f in found.told for figure in f.figures)]
    shown += [item.figure for ch in chapter_list for item in ch.items if isinstance(item, Chart)]
    data, thinned = _data(c, shown, found)
    style, script = _style(), _script()
    environment = _environment()
    return environment.from_string(_template("page.html")).render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_inert(data)),
        name=c.name[:NAME_LIMIT],
        about=_about(c),
        verdict=verdict(c),
        numbers=numbers(c, found),
        warning=_warning(c),
        timeline=timeline,
        findings_lead=found.lead,
        findings=found.told,
        more=_more(found),
        undecided=words.listing(found.undecided),
        chapters=chapter_list,
        entries={chapter.id: chapter.entry for chapter in chapter_list},
        units={figure.id: _unit(figure, thinned) for figure in shown},
        footer=_footer(c),
    )


def _timeline(c: Contents, found: Findings) -> list[Figure]:
    """Events, loss, and what the worst finding is about, on one step axis."""
    chosen: list[Figure | None] = [_lanes(found)] if found.told else []
    if c.tasks():
        chosen.append(figures.accuracy(c, "over-accuracy", 104, context=True, xaxis=False))
    alone = c.get("stability/edge_ratio") is None
    chosen.append(figures.loss(c, "over-loss", 112, context=True, xaxis=alone))
    if any(finding.chapter == "logits" for finding in found.told):
        chosen.append(figures.largest_attention(c, "over-attention", 78))
    ratio = figures.edge_ratio(c, "over-edge", 118, context=True)
    chosen.append(ratio)
    return [figure for figure in chosen if figure is not None] if c.rows else []


def _lanes(found: Findings) -> Figure:
    events = [f"{one.label} ({one.when})" for one in (*found.told, *found.more)[:40]]
    return figures.timeline(f"Events: {'; '.join(events)}.")


def _about(c: Contents) -> list[str]:
    """How long the run is, and how it ended."""
    if not c.rows:
        return ["no step yet" if c.alive else "no steps"]
    parts = [words.count(len(c.tasks()), "task")] if len(c.tasks()) > 1 else []
    many = c.last - c.first + 1
    steps = f"{words.steps(many)} step{'' if many == 1 else 's'}"
    if len(c.restarts) == 1:
        parts.append(f"restarted at step {words.steps(c.restarts[0])}")
    elif c.restarts:
        parts.append(f"restarted {words.often(len(c.restarts))}")
    if c.ended:
        errors = [
            str(notice.get("text"))[:100].rstrip(": ")
            for notice in c.metadata.get("notices") or ()
            if isinstance(notice, Mapping) and notice.get("source") == "training"
        ]
        return [*parts, steps, f"{'ended' if errors else 'finished'} {when(c.ended)}", *errors[-1:]]
    if c.alive:
        return [*parts, f"still running, step {words.steps(c.last)}"]
    if "dyndiag" not in c.metadata:
        return [*parts, steps]
    return [*parts, f"{steps}, its end was not recorded"]


def _warning(c: Contents) -> str:
    if c.replay != "disagrees":
        return ""
    which = "; ".join(c.disagreements[:5])
    more = f"; and {len(c.disagreements) - 5} more" if len(c.disagreements) > 5 else ""
    return (
        "Replaying the detectors over the stored series gives other events than the run stored; "
        f"the replay's are shown. They differ in: {which}{more}."
    )


def _footer(c: Contents) -> str:
    version = f" {c.metadata['dyndiag']}" if c.metadata.get("dyndiag") else ""
    return (
        f"Made from the run's store, which was written by dyndiag{version}; nothing on this page "
        "is loaded from a network."
    )


def _more(found: Findings) -> Table | None:
    if not found.more:
        return None
    rows = tuple((f.kind_text, f.when, f.title, f"{f.dots} {f.sure}") for f in found.more[:200])
    return Table(("also", "when", "what", "how sure"), rows, (False, False, False, False))


def _unit(figure: Figure, thinned: dict[str, int]) -> str:
    ratios = [thinned[one.name] for one in figure.data if one.name in thinned and not one.columns]
    if not ratios:
        return figure.unit
    drawn = f"1 of {words.steps(max(ratios))} steps drawn, extremes kept"
    return "; ".join(part for part in (figure.unit, drawn) if part)


# ---------- the data of the charts ----------


def _data(
    c: Contents, shown: Sequence[Figure], found: Findings
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the script draws from; and for each thinned series how many steps one point stands for.

    Buckets are made coarser until all series together are small enough.
    """
    drawn = {one.name: one for figure in shown for one in figure.data}
    spans = [(f.event.start, c.last if f.event.end is None else f.event.end) for f in found.told]
    buckets = thinning.BUCKETS
    series, thinned = _encoded(drawn, buckets, thinning.windows(spans))
    while buckets > 64 and sum(len(json.dumps(one)) for one in series.values()) > DATA_LIMIT:
        buckets //= 2
        series, thinned = _encoded(drawn, buckets, thinning.windows(spans))
    task_starts = starts(c)
    return {
        "first": c.first,
        "last": c.last,
        "live": c.alive,
        "series": series,
        "events": list(_events(c, found)),
        "switches": [{"at": at} for at in sorted(task_starts.values()) if at > c.first],
        "density": figures.density_data(c),
        "charts": {figure.id: _spec(figure) for figure in shown},
    }, thinned


def _encoded(
    drawn: dict[str, Drawn], buckets: int, windows: Sequence[tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, int]]:
    series, thinned = {}, {}
    for name, one in drawn.items():
        all_steps, all_values = one.series.steps, one.series.values
        if one.columns:
            index = thinning.largest(all_steps, all_values, min(1024, buckets))
        else:
            index = thinning.kept(all_steps, all_values, buckets, windows)
        steps, values = all_steps[index], all_values[index]
        coded = {**thinning.packed_steps(steps), "v": thinning.packed(values)}
        gaps = [] if one.columns else _gaps(all_steps, index)
        if gaps:
            coded["breaks"] = gaps
        if one.lower is not None and one.upper is not None:
            coded["lo"] = thinning.packed(one.lower[index])
            coded["hi"] = thinning.packed(one.upper[index])
        if one.status is not None:
            coded["status"] = "".join(np.array(list(one.status))[index])
        series[name] = coded
        if len(index) < len(all_steps) or one.series.rows > len(all_steps):
            thinned[name] = max(2, round(one.series.rows / buckets))
    return series, thinned


def _gaps(steps: thinning.Steps, index: np.ndarray) -> list[int]:
    """Positions among the kept points that come after a gap of the whole series."""
    if len(index) == len(steps):
        return thinning.breaks(steps)
    gaps = np.array(thinning.breaks(steps), dtype=np.int64)
    return sorted({int(i) for i in np.searchsorted(index, gaps)} - {len(index)})


def _events(c: Contents, found: Findings) -> Iterator[dict[str, Any]]:
    for finding in sorted((*found.told, *found.more), key=lambda one: one.event.start):
        event = finding.event
        yield {
            "kind": event.kind,
            "colour": finding.colour,
            "start": event.start,
            "end": c.last if event.end is None else event.end,
            "open": event.end is None,
            "label": finding.label,
            "short": finding.short,
            "notches": list(finding.notches[:200]),
            "finding": finding.id if finding in found.told else None,
        }


def _spec(figure: Figure) -> dict[str, Any]:
    spec = asdict(figure)
    for key in ("data", "unit"):
        del spec[key]
    spec["marks"] = [_present(mark) for mark in spec["marks"]]
    spec["notes"] = [_present(note) for note in spec["notes"]]
    return _present(spec)


def _present(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _inert(data: dict[str, Any]) -> str:
    """JSON that no HTML parser can mistake for the end of its element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------- template ----------


def _environment() -> Environment:
    environment = Environment(autoescape=True, loader=BaseLoader(), finalize=_finalize)
    environment.filters["sentence"] = _sentence
    environment.filters["percent"] = lambda share: words.percent(share, 1)
    environment.filters["bar"] = lambda share: f"{max(1.0, 1000 * share - 1.5):.1f}"
    environment.filters["before"] = lambda parts, i: f"{1000 * sum(p[1] for p in parts[:i]):.1f}"
    return environment


def _finalize(value: Any) -> Any:
    """A number and its percent sign stay on one line; control characters do not travel."""
    if isinstance(value, str) and not isinstance(value, Markup):
        value = "".join(ch for ch in value if ch >= " " or ch in "\n\t")
        return value.replace(" %", "\u00a0%")
    return value


def _sentence(text: str) -> str:
    text = words.capital(text.strip())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _template(name: str) -> str:
    return (resources.files("dyndiag.reports") / "templates" / name).read_text("utf-8")


def _style() -> str:
    return _template("page.css")


def _script() -> str:
    parts = "\n".join(_template(f"js/{name}.js") for name in SCRIPTS)
    return f"(() => {{\n'use strict';\n{parts}}})();\n"


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

    return (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; "
        f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'"
    )
