"""A run as plain data: what the report knows before anything is said or drawn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyndiag.detectors import detectors_from, replay
from dyndiag.reports import thinning
from dyndiag.reports.thinning import Floats, Steps
from dyndiag.store import Run
from dyndiag.values import Event

REPLAYED = 250_000  # steps of a run whose detectors are replayed, at some 40 µs each
STATUS = {"c": "certified", "p": "provisional", "o": "not converged"}
WHOLE = ("continual/", "train/", "failures/")  # their parts are no modules
CURVATURE = (
    "curvature/sharpness",
    "curvature/preconditioned_sharpness",
    "curvature/batch_sharpness",
    "curvature/smallest",
    "curvature/trace",
    "stability/edge_ratio",
    "stability/threshold",
)
COLUMNS = (".error", ".products", ".converged", ".provisional", ".upper_bound", ".lower_bound")
SAMPLED = ("curvature/trace", "curvature/batch_sharpness")  # their error is a standard error
STUDENT = (  # two-sided 95 % points of Student's t with 1, 2, … degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A named series: `values[i]` at `steps[i]`, ascending; NaN was measured as NaN."""

    name: str
    steps: Steps
    values: Floats
    rows: int
    """How many values the run holds, before any were left out."""

    def __len__(self) -> int:
        return len(self.steps)

    def within(self, start: int, end: int) -> Floats:
        """The values at steps start … end."""
        return self.values[self._slice(start, end)]

    def at(self, step: int) -> float:
        """The value at the last sample not after `step`; NaN before the first."""
        i = int(np.searchsorted(self.steps, step, side="right")) - 1
        return float(self.values[i]) if i >= 0 else float("nan")

    def _slice(self, start: int, end: int) -> slice:
        return slice(
            int(np.searchsorted(self.steps, start)),
            int(np.searchsorted(self.steps, end, side="right")),
        )


@dataclass(frozen=True)
class Estimates(Series):
    """A series whose values carry an interval and a status: c certified, p provisional,
    o not converged, one letter a sample."""

    lower: Floats
    upper: Floats
    status: str
    products: int

    def statuses(self, start: int, end: int) -> str:
        return self.status[self._slice(start, end)]


@dataclass(frozen=True)
class Density:
    """One sample of the spectral density: per unit of eigenvalue, with half its spread over the
    probes, on `grid`; `nodes` and `weights` of the quadrature where they were kept."""

    step: int
    grid: Floats
    mean: Floats
    half: Floats
    nodes: Floats
    weights: Floats


@dataclass(frozen=True)
class Contents:
    """All that a report says rests on this. Global series are whole; those of single modules are
    thinned while they are read."""

    name: str
    first: int
    last: int
    rows: int
    series: Mapping[str, Series]
    estimates: Mapping[str, Estimates]
    densities: tuple[Density, ...]
    events: tuple[Event, ...]
    metadata: Mapping[str, Any]
    replay: str
    """How the events came about: agrees, disagrees, or why there was no replay."""
    disagreements: tuple[str, ...] = ()
    """Events that only one of store and replay has."""
    ended: str = ""
    """ISO time at which the run finished; empty if it did not say so."""
    alive: bool = False
    """Not finished, and written to within the last two minutes."""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Module names in forward order, by the prefix of their series."""

    def get(self, name: str) -> Series | None:
        """The series or estimate of that name; None where it was not measured."""
        return self.estimates.get(name) or self.series.get(name)

    @property
    def loss(self) -> Series | None:
        return self.series.get("train/loss")

    @property
    def restarts(self) -> tuple[int, ...]:
        """The steps at which the run was gone on with."""
        kept = self.metadata.get("restarts")
        return (
            tuple(step for step in kept if isinstance(step, int)) if isinstance(kept, list) else ()
        )

    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have an accuracy, in the order in which they were trained."""
        prefix = "continual/accuracy/"
        found = [name[len(prefix) :] for name in self.series if name.startswith(prefix)]
        order = [str(task) for task in self.metadata.get("tasks") or ()]
        return tuple(sorted(found, key=lambda t: (order.index(t) if t in order else 1e9, t)))


def clipped_share(c: Contents, start: int, end: int) -> float | None:
    """Share of the steps start … end whose gradient was cut; None where clipping was not seen."""
    before, after = c.series.get("gradients/norm"), c.series.get("gradients/norm_clipped")
    if before is None or after is None:
        return None
    both, i, j = np.intersect1d(before.steps, after.steps, return_indices=True)
    inside = (both >= start) & (both <= end)
    if not inside.any():
        return None
    cut = after.values[j][inside] < 0.999 * before.values[i][inside]
    return float(np.mean(cut))


def contents(run: Run) -> Contents:
    """Read a run, replay its detectors, and put everything into plain data.

    Cost: one pass over the store for the replay, one of each stream; a quarter of a
    minute and some hundred megabytes at a million steps of 37 series.
    """
    metadata = dict(run.metadata)
    stored = run.event_list()
    events, how, differences = _events(run, stored, metadata)
    names = dict.fromkeys(run.names)
    prefixes = tuple(dict.fromkeys(filter(None, map(_prefix, names))))
    spans = [(event.start, event.peak if event.end is None else event.end) for event in events]
    whole = thinning.windows(spans[:40])
    series: dict[str, Series] = {}
    parts: dict[str, Series] = {}
    for name, steps, values in run.columns():
        one = Series(name, steps, values, len(steps))
        if _prefix(name) and len(one) > 3 * thinning.BUCKETS:
            index = thinning.kept(one.steps, one.values, windows=whole)
            one = Series(name, one.steps[index], one.values[index], one.rows)
        of_estimate = name.endswith(COLUMNS) and name.rpartition(".")[0] in names
        (parts if of_estimate else series)[name] = one
    estimates = {
        name: _estimates(series.pop(name), parts)
        for name in CURVATURE
        if name in series and f"{name}.converged" in parts
    }
    held = [one for one in (*series.values(), *estimates.values()) if len(one)]
    return Contents(
        name=run.name,
        first=min((int(one.steps[0]) for one in held), default=0),
        last=max((int(one.steps[-1]) for one in held), default=0),
        rows=max((one.rows for one in held), default=0),
        series=series,
        estimates=estimates,
        densities=tuple(_densities(run)),
        events=events,
        metadata=metadata,
        replay=how,
        disagreements=differences,
        ended=str(metadata.get("finished") or ""),
        alive=not metadata.get("finished")
        and (run.folder / "run.db").stat().st_mtime > time.time() - 120,
        parts={prefix: _forward(names, prefix, metadata) for prefix in prefixes},
    )


def student(products: float) -> float:
    """Two-sided 95 % point of Student's t for a mean over `products` probes.

    >>> student(10), student(1)
    (2.262, inf)
    """
    freedom = int(products) - 1
    if freedom < 1:
        return float("inf")
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom


def _events(
    run: Run, stored: list[Event], metadata: Mapping[str, Any]
) -> tuple[tuple[Event, ...], str, tuple[str, ...]]:
    """The events to show: the replay's, with what it and the store do not agree on."""
    parameters = metadata.get("detectors")
    if parameters and (run.last_step or 0) > REPLAYED:
        return tuple(stored), f"not replayed: more than {REPLAYED:,} steps", ()
    if not parameters:
        if stored:
            return tuple(stored), "the run keeps no detector settings; its own events are shown", ()
        replayed = replay(run.rows())
        return tuple(replayed), "found now, with the default settings", ()
    replayed = replay(run.rows(), detectors_from(parameters))
    told = {event.name: event for event in stored}
    again = {event.name: event for event in replayed}
    differences = [_called(event) for name, event in told.items() if name not in again]
    differences += [_called(event) for name, event in again.items() if name not in told]
    differences += [
        _called(event)
        for name, event in again.items()
        if name in told and (event.peak, event.end) != (told[name].peak, told[name].end)
    ]
    if differences:
        return tuple(replayed), "disagrees", tuple(sorted(differences))
    return tuple(replayed), "agrees", ()


def _called(event: Event) -> str:
    return f"{event.kind} from step {event.start}"


def _estimates(one: Series, parts: Mapping[str, Series]) -> Estimates:
    """The series with its interval: from the certificate, the residual, or Student's t."""

    def column(part: str, missing: float) -> Floats:
        found = parts.get(f"{one.name}.{part}")
        if found is None:
            return np.full(len(one), missing)
        values = np.full(len(one), np.nan)
        _, here, there = np.intersect1d(one.steps, found.steps, return_indices=True)
        values[here] = found.values[there]
        return values

    value, error = one.values, column("error", np.nan)
    products = column("products", 0.0)
    certified = column("converged", 0.0) == 1
    provisional = column("provisional", 0.0) == 1
    if one.name in SAMPLED:
        width = np.array([student(n) if n == n else np.inf for n in products]) * error
        lower, upper = value - width, value + width
    else:
        bound_above, bound_below = column("upper_bound", np.nan), column("lower_bound", np.nan)
        # a Ritz value never exceeds the largest eigenvalue: certified intervals open upwards
        below = np.where(certified, value, value - error)
        lower = np.where(np.isfinite(bound_below), bound_below, below)
        upper = np.where(np.isfinite(bound_above), bound_above, value + error)
    lower = np.where(np.isfinite(lower), lower, value)
    upper = np.where(np.isfinite(upper), upper, value)
    status = "".join(
        "c" if c else "p" if p else "o" for c, p in zip(certified, provisional, strict=True)
    )
    total = int(np.nansum(products))
    return Estimates(one.name, one.steps, value, one.rows, lower, upper, status, total)


def _densities(run: Run) -> Iterator[Density]:
    if "curvature/density" not in run.array_names:
        return
    nodes = run.arrays("curvature/density_nodes") if _has_nodes(run) else {}
    for step, rows in sorted(run.arrays("curvature/density").items()):
        grid, mean, half = (np.asarray(row, dtype=np.float64) for row in rows)
        at, weight = nodes.get(step, np.empty((2, 0)))
        if np.all(np.isfinite(grid)) and np.all(np.diff(grid) > 0):
            yield Density(step, grid, mean, half, np.asarray(at), np.asarray(weight))


def _has_nodes(run: Run) -> bool:
    return "curvature/density_nodes" in run.array_names


def _prefix(name: str) -> str:
    """`area/quantity/` of a series of one module; empty for any other."""
    area, quantity, *part = [*name.split("/", 2), ""]
    return f"{area}/{quantity}/" if any(part) and not name.startswith(WHOLE) else ""


def _forward(names: Iterable[str], prefix: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that have a series under `prefix`, in the model's order."""
    found = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    model = metadata.get("model")
    listed = model.get("modules") if isinstance(model, Mapping) else None
    order = {str(module): i for i, module in enumerate(listed or ())}
    return tuple(sorted(found, key=lambda module: order.get(module, len(order))))
