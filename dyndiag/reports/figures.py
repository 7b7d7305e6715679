"""Charts as plain data: which series, which scale, which marks. Nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Density, Estimates, Series
from dyndiag.reports.thinning import BUCKETS, Floats, bucket_medians, noisy, running_median

COLOURS = ("s1", "s2", "s3", "s4")
MEDIAN = "; thick: median of 11 steps"
MOST_ROWS = 48
LOGITS = 1000.0  # an attention logit known to hurt


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


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def wide(values: Floats, ratio: float = 20.0) -> bool:
    """Whether a logarithmic axis is called for: all positive and spread over more than `ratio`."""
    finite = _finite(values)
    return len(finite) > 1 and bool(finite.min() > 0) and finite.max() > ratio * finite.min()


def scale(values: Floats, ratio: float = 20.0, zero: bool = False) -> dict[str, Any]:
    """Logarithmic if `wide`, else linear, from zero if asked."""
    if wide(values, ratio):
        return {"type": "log"}
    return {"min": 0} if zero else {}


def _unit(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _log(y: Mapping[str, Any]) -> str:
    return "log scale" if y.get("type") == "log" else ""


def _line(
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
    name, said = f"median: {series.name}", MEDIAN
    median = Series(name, series.steps, running_median(series.values), series.rows)
    if len(series) > 3 * BUCKETS:  # a median of 11 would be as noisy, at this width
        at, middle = bucket_medians(series.steps, series.values)
        median = Series(name, at, middle, len(at))
        said = f"; thick: median of each {words.steps(len(series) // len(at))} steps"
    mark = Mark("line", series.name, label, cls, smooth=name, **more)
    return mark, (Drawn(series.name, series), Drawn(name, median)), said


def _est(one: Estimates, label: str, cls: str) -> tuple[Mark, tuple[Drawn, ...]]:
    return Mark("est", one.name, label, cls), (
        Drawn(one.name, one, one.lower, one.upper, one.status),
    )


def _in(series: Series, window: tuple[int, int] | None) -> Floats:
    return series.values if window is None else series.within(*window)


def loss_unit(c: Contents) -> str:
    """What the loss is, as far as the run tells."""
    name = str(c.metadata.get("loss_function") or "")
    low = name.lower().replace("_", "").replace(" ", "")
    if "crossentropy" in low or "nll" in low:
        return "cross-entropy in nats"
    if "mse" in low:
        return "mean squared error"
    return ""


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
    mark, data, median = _line(series, "loss", "loss", plain=window is not None)
    y = scale(_in(series, window), ratio=3.0)
    unit = _unit(loss_unit(c), _log(y)) + median
    return Figure(
        id, "Loss", unit.removeprefix("; "), height, (mark,), data, y,
        says=f"The loss went from {words.number(first(series))} to {words.number(final(series))}.",
        window=window, context=context, xaxis=xaxis, notes=notes,
    )  # fmt: skip


def first(series: Series) -> float:
    """The first finite value; NaN if there is none."""
    finite = _finite(series.values)
    return float(finite[0]) if len(finite) else math.nan


def final(series: Series, window: int = 20) -> float:
    """Median of the last `window` finite values; NaN if there is none."""
    finite = _finite(series.values)
    return float(np.median(finite[-window:])) if len(finite) else math.nan


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
    if one is None or not len(one):
        return None
    rule = Mark("rule", y=1.0, cls="limit", label=None)
    mark, data = (
        _est(one, "edge ratio", "s1")
        if isinstance(one, Estimates)
        else _line(one, "edge ratio", "s1", plain=True)[:2]
    )
    y = scale(_in(one, window), zero=window is None)
    sharp = "preconditioned sharpness" if _preconditioned(c) else "sharpness"
    below = formula(c)
    unit = _unit(
        f"{sharp} ÷ {f'({below})' if below != 'threshold' else below}"
        + ("" if window else "; 1 is the edge of stability"),
        _log(y),
    )
    note = (Note(c.first + 0.04 * (c.last - c.first), "the edge", 1.0, dy=-6),) if context else ()
    low, high = _range(one.values)
    return Figure(
        id, "Edge ratio", unit if window is None else _log(y), height, (rule, mark), data, y,
        says=f"Between {words.number(low)} and {words.number(high)}; 1 is the edge of stability.",
        window=window, context=context, xaxis=xaxis, notes=note,
    )  # fmt: skip


def _preconditioned(c: Contents) -> bool:
    return c.get("curvature/preconditioned_sharpness") is not None


def _range(values: Floats) -> tuple[float, float]:
    finite = _finite(values)
    return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)


def sharpness(
    c: Contents, id: str = "sharp", height: int = 290, window: tuple[int, int] | None = None
) -> Figure | None:
    """Sharpness against its threshold, with the rates named on it."""
    one = main_sharpness(c)
    if one is None or not len(one):
        return None
    label = "preconditioned sharpness" if _preconditioned(c) else "sharpness"
    mark, data = (
        _est(one, label, "s1")
        if isinstance(one, Estimates)
        else _line(one, label, "s1", plain=True)[:2]
    )
    marks, shown = [mark], list(data)
    notes: tuple[Note, ...] = ()
    limit = c.get("stability/threshold")
    values = _in(one, window)
    if limit is not None and len(limit):
        text = formula(c) if window else f"threshold {formula(c)}".removesuffix(" threshold")
        marks.insert(0, Mark("steps", limit.name, text, "limit"))
        shown.append(Drawn(limit.name, limit))
        values = np.concatenate([values, _in(limit, window)])
        notes = _rates(c, limit) if window is None else ()
    y = scale(values, zero=window is None)
    title = "Sharpness" if window else capital_title(label, limit is not None)
    unit = _unit(
        "1 / learning rate" if _preconditioned(c) else "loss per squared parameter", _log(y)
    )
    low, high = _range(one.values)
    return Figure(
        id, title, unit, height, tuple(marks), tuple(shown), y,
        says=f"{words.capital(label)} lay between {words.number(low)} and {words.number(high)}.",
        window=window, notes=notes,
    )  # fmt: skip


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
    return tuple(
        Note(float(max(step, c.first)), f"η = {words.plain(rate)}", _next(limit, step), dx=6, dy=-8)
        for step, rate in changes
        if math.isfinite(_next(limit, step))
    )


def _next(series: Series, step: int) -> float:
    i = min(int(np.searchsorted(series.steps, step)), len(series) - 1)
    return float(series.values[i])


def trace(c: Contents, id: str = "trace") -> Figure | None:
    one = c.get("curvature/trace")
    if one is None or not len(one):
        return None
    ends = [one.lower, one.upper] if isinstance(one, Estimates) else []
    y = scale(np.concatenate([one.values, *ends]))
    unit = _unit("loss per squared parameter", _log(y))
    if not isinstance(one, Estimates):
        mark, data, _ = _line(one, "trace", "s3", plain=True)
    else:
        mark, data = (
            Mark("band", one.name, "trace", "s3"),
            (Drawn(one.name, one, one.lower, one.upper, one.status),),
        )
        unit += "; band: 95 % interval over the probes"
    return Figure(
        id, "Hessian trace", unit, 140, (mark,), data, y, says="The sum of all eigenvalues."
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
    mark, data, median = _line(series, label, cls, plain=window is not None)
    y = scale(_in(series, window), ratio=3.0) if log else {}
    unit = _unit(unit, _log(y)) + median
    return Figure(id, title, unit, height, (mark,), data, y, says=says, window=window)


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
        mark, shown, median = _line(
            before, "before clipping" if after is not None else "gradient norm", "loss",
            plain=window is not None,
        )  # fmt: skip
        marks.append(mark)
        data.extend(shown)
        values.append(_in(before, window))
    if after is not None:
        mark, shown, _ = _line(after, "after clipping", "limit", plain=not median, dash="dash")
        marks.append(mark)
        data.extend(shown)
        values.append(_in(after, window))
    y = scale(np.concatenate(values), ratio=3.0)
    return Figure(
        id, "Gradient norm", _unit("L2, whole model", _log(y)) + median, height, tuple(marks),
        tuple(data), y, window=window, says="L2 norm of the step's gradient.",
    )  # fmt: skip


def heat(c: Contents, prefix: str, title: str, unit: str, id: str) -> Figure | None:
    """A row for each module, in forward order; more than 48 are joined by the names they share."""
    modules = c.parts.get(prefix, ())
    rows = joined(c, prefix, modules)
    values = [_finite(row.values) for row in rows]
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
        id, title, f"{unit}, log scale, largest within each column{joint}",
        34 + 19 * len(rows), (mark,), tuple(Drawn(row.name, row, columns=True) for row in rows),
        says=f"{words.count(len(rows), 'row')}, one a module.",
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
        out.append(_largest(f"{prefix}:{group}", all_of))
    return out


def attention_names(c: Contents) -> tuple[str, tuple[str, ...]]:
    """The prefix of the attention series to show (the complete ones), and their modules."""
    for prefix in ("attention/logit_max/", "attention/logit_max_sampled/"):
        modules = c.parts.get(prefix, ())
        if modules:
            return prefix, modules
    return "", ()


def attention(
    c: Contents, id: str = "attention", height: int = 230, window: tuple[int, int] | None = None
) -> Figure | None:
    """A line a block, up to four; a heat map for more. Rules at 50 and 1,000 where they matter."""
    prefix, modules = attention_names(c)
    if not modules:
        return None
    if len(modules) > 4:
        if window is None:
            return heat(c, prefix, "Largest attention logit by block", "nats, unmasked pairs", id)
        worst = max(modules, key=lambda m: _range(c.series[prefix + m].within(*window))[1])
        modules = (worst,)
    marks: list[Mark] = []
    data: list[Drawn] = []
    order = ("s3", "s4", "s2", "s1")
    values = np.concatenate([_in(c.series[prefix + module], window) for module in modules])
    y = scale(values, ratio=10.0)
    notes: list[Note] = []
    high = _range(values)[1]
    for level, text in ((50.0, "50"), (1000.0, "1,000: known to hurt")):
        if level / 2 < high < 50 * level:
            marks.append(Mark("rule", y=level, cls="limit", dash="dot"))
            if window is None:
                notes.append(Note(float(c.first), text, level, dx=4, dy=-6))
    for module, cls in zip(modules, order, strict=False):
        marks.append(Mark("line", prefix + module, module, cls, dots=True))
        data.append(Drawn(prefix + module, c.series[prefix + module]))
    return Figure(
        id, "Largest attention logit" + ("" if window else " by block"),
        _unit("nats, unmasked pairs", _log(y)), height, tuple(marks), tuple(data), y,
        window=window, notes=tuple(notes),
        says=f"The largest value was {words.number(high)}.",
    )  # fmt: skip


def largest_attention(c: Contents, id: str, height: int) -> Figure | None:
    """The largest attention logit of all blocks, for the timeline."""
    prefix, modules = attention_names(c)
    if not modules:
        return None
    whole = _largest(f"{prefix}:largest", [c.series[prefix + module] for module in modules])
    y = scale(whole.values, ratio=10.0)
    marks = [Mark("line", whole.name, "largest attention logit", "s4")]
    notes: tuple[Note, ...] = ()
    if _range(whole.values)[1] > LOGITS / 2:
        marks.insert(0, Mark("rule", y=LOGITS, cls="limit", dash="dot"))
        notes = (Note(float(c.first), "1,000", LOGITS, dx=4, dy=-5),)
    return Figure(
        id, "Largest attention logit", _unit("all blocks", _log(y)), height, tuple(marks),
        (Drawn(whole.name, whole),), y, context=True, xaxis=False, notes=notes,
    )  # fmt: skip


def _largest(name: str, parts: Sequence[Series]) -> Series:
    """At each step the largest of several series."""
    steps = np.concatenate([one.steps for one in parts])
    values = np.concatenate([one.values for one in parts])
    if len(parts) > 1:
        order = np.lexsort((-np.where(np.isnan(values), -np.inf, values), steps))
        steps, values = steps[order], values[order]
        keep = np.r_[True, steps[1:] != steps[:-1]]
        steps, values = steps[keep], values[keep]
    return Series(name, steps, values, parts[0].rows)


def logits(c: Contents, id: str = "logits") -> Figure | None:
    pairs = (
        ("logits/max", "largest logit", "loss"),
        ("logits/log_partition", "log partition", "s3"),
    )
    shown = [(c.series[name], label, cls) for name, label, cls in pairs if name in c.series]
    if not shown:
        return None
    marks = tuple(Mark("line", one.name, label, cls) for one, label, cls in shown)
    data = tuple(Drawn(one.name, one) for one, _, _ in shown)
    return Figure(id, "Logits", "nats, training batch", 140, marks, data)


def wilson(accuracy: Floats, samples: Floats) -> tuple[Floats, Floats]:
    """Ends of the 95 % Wilson interval of a share measured on `samples` predictions."""
    z = 1.959964
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (accuracy + z * z / (2 * samples)) / (1 + z * z / samples)
        half = (
            z
            * np.sqrt(accuracy * (1 - accuracy) / samples + z * z / (4 * samples**2))
            / (1 + z * z / samples)
        )
    return middle - half, middle + half


def _task(c: Contents, task: str, cls: str, label: str) -> tuple[Mark, Drawn]:
    series = c.series[f"continual/accuracy/{task}"]
    samples = c.series.get(f"continual/samples/{task}")
    if samples is None or not len(samples):
        return Mark("line", series.name, label, cls, fmt="percent"), Drawn(series.name, series)
    at = np.clip(np.searchsorted(samples.steps, series.steps, side="right") - 1, 0, None)
    lower, upper = wilson(series.values, samples.values[at])
    mark = Mark("band", series.name, label, cls, fmt="percent")
    return mark, Drawn(series.name, series, lower, upper)


def accuracy(
    c: Contents,
    id: str = "accuracy",
    height: int = 240,
    context: bool = False,
    xaxis: bool = True,
) -> Figure | None:
    """A line with its Wilson band for each task; with more than four tasks a heat map's place is
    taken by the first two, the worst, and the last one."""
    tasks = c.tasks()
    if not tasks:
        return None
    more = ""
    if len(tasks) > 4:
        worst = min(tasks[:-1], key=lambda t: final(c.series[f"continual/accuracy/{t}"], 5))
        chosen = dict.fromkeys([tasks[0], tasks[1], worst, tasks[-1]])
        more = f"; {len(chosen)} of {len(tasks)} tasks, the rest in the table"
        tasks = tuple(chosen)
    pairs = [_task(c, task, cls, f"task {task}") for task, cls in zip(tasks, COLOURS, strict=False)]
    return Figure(
        id, "Accuracy by task", f"{samples_text(c, tasks)}{more}", height,
        tuple(mark for mark, _ in pairs), tuple(drawn for _, drawn in pairs),
        {"min": 0, "max": 1.04, "fmt": "percent"}, context=context, xaxis=xaxis,
        says="Accuracy of each task at every evaluation.",
    )  # fmt: skip


def samples_text(c: Contents, tasks: Sequence[str]) -> str:
    counts = set()
    for task in tasks:
        series = c.series.get(f"continual/samples/{task}")
        if series is not None and len(series):
            counts.add(int(np.nanmax(series.values)))
    if not counts:
        return "held-out samples; their number is not known"
    many = words.steps(counts.pop()) if len(counts) == 1 else f"{min(counts):,} or more"
    return f"{many} predictions each; band: 95 % interval (Wilson)"


def task_accuracy(
    c: Contents, task: str, window: tuple[int, int], reference: float, id: str,
    points: Sequence[tuple[float, float]] = (), notes: tuple[Note, ...] = (),
) -> Figure | None:  # fmt: skip
    """One task around a switch, with the level before it dotted."""
    if f"continual/accuracy/{task}" not in c.series:
        return None
    mark, drawn = _task(c, task, "s1", "accuracy")
    marks = [mark, Mark("points", cls="s4", at=tuple(points))]
    if math.isfinite(reference):
        marks.append(Mark("rule", y=reference, cls="s1", dash="dot"))
    return Figure(
        id, f"Accuracy of task {task}", "95 % interval; dotted: before the switch", 170,
        tuple(marks), (drawn,), {"fmt": "percent"}, window=window, notes=notes,
    )  # fmt: skip


def spectrum(c: Contents, id: str = "spectrum") -> Figure | None:
    """A half violin at each sample of the density."""
    if not c.densities:
        return None
    grid, linear = density_grid(c)
    marks = [Mark("violins")]
    data: list[Drawn] = []
    limit = c.get("stability/threshold")
    if limit is not None and len(limit) and not _preconditioned(c):
        marks.append(
            Mark("steps", limit.name, f"threshold {formula(c)}".removesuffix(" threshold"), "limit")
        )
        data.append(Drawn(limit.name, limit))
    y = {"type": "symlog", "c": linear, "min": float(grid[0]), "max": float(grid[-1]), "hard": True}
    return Figure(
        id, "Spectrum over time", "eigenvalue, symmetric log scale; width: log density; "
        "ticks: the sharpness", 280, tuple(marks), tuple(data), y, table=False,
        says=f"{words.count(len(c.densities), 'sample')} of the spectral density.",
    )  # fmt: skip


def density(c: Contents, id: str = "density") -> Figure | None:
    if not c.densities:
        return None
    return Figure(
        id, "Density at one step",
        "mass per decade of this axis, log scale; band: smallest to largest of the probes", 170, (),
        kind="density", table=False, says="Most of the mass lies near zero.",
    )  # fmt: skip


def density_grid(c: Contents) -> tuple[Floats, float]:
    """One grid for all samples, even on the symmetric log axis, and that axis's linear part.

    It ends where no sample has mass left, or at the largest threshold.
    """
    samples = c.densities
    reach = max(float(np.abs(s.nodes if len(s.nodes) else s.grid).max()) for s in samples)
    linear = 1e-3 * reach or 1.0
    ends: list[float] = []
    for s in samples:
        inside = s.nodes if len(s.nodes) else s.grid[s.mean * _per_decade(s.grid, linear) > 1e-4]
        ends += [float(inside.min()), float(inside.max())] if len(inside) else []
    limit = None if _preconditioned(c) else c.get("stability/threshold")
    if limit is not None and np.isfinite(limit.values).any():
        ends.append(min(float(np.nanmax(limit.values)), 10 * reach))
    low, high = np.arcsinh(np.array([min(ends, default=-reach), max(ends, default=reach)]) / linear)
    margin = 0.05 * (high - low) or 1.0
    return linear * np.sinh(np.linspace(low - margin, high + margin, 220)), linear


def _per_decade(grid: Floats, linear: float) -> Floats:
    """What turns a density per unit into one per decade of the symmetric log axis."""
    return np.asarray(math.log(10) * np.sqrt(grid**2 + linear**2))


def _decades(values: Floats, linear: float) -> Floats:
    return np.asarray(np.arcsinh(values / linear) / math.log(10))


def probes_of(s: Density) -> list[tuple[Floats, Floats]]:
    """The quadrature's nodes and weights, probe by probe, each with mass 1; empty if the order of
    the nodes does not tell the probes apart. Within a probe nodes ascend."""
    if not len(s.nodes):
        return []
    cuts = np.flatnonzero(np.diff(s.nodes) < 0) + 1
    parts = list(zip(np.split(s.nodes, cuts), np.split(s.weights, cuts), strict=True))
    masses = np.array([weights.sum() for _, weights in parts])
    if masses.min() <= 0 or masses.max() > 1.001 * masses.min():
        return []
    return [(nodes, weights / weights.sum()) for nodes, weights in parts]


def _curves(s: Density, grid: Floats, linear: float) -> tuple[Floats, Floats, Floats]:
    """Mean, smallest and largest density over the probes, per decade of the symmetric log axis.

    From the nodes, smoothed on this axis: a kernel of one width in eigenvalues would draw humps
    around zero that are not there. From the kept density where there are no nodes.
    """
    parts = probes_of(s)
    if not parts:
        mean = np.interp(grid, s.grid, s.mean, left=0, right=0) * _per_decade(grid, linear)
        half = np.interp(grid, s.grid, s.half, left=0, right=0) * _per_decade(grid, linear)
        return mean, np.maximum(0, mean - half), mean + half
    at = _decades(grid, linear)
    width = 0.008 * (at[-1] - at[0])
    curves = np.stack(
        [
            np.exp(-0.5 * ((at[:, None] - _decades(nodes, linear)) / width) ** 2) @ weights
            for nodes, weights in parts
        ]
    ) / (width * math.sqrt(2 * math.pi))
    return curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)


def density_data(c: Contents) -> dict[str, Any] | None:
    """The samples on one grid, as mass per decade of the symmetric log axis; at most 120."""
    if not c.densities:
        return None
    chosen = np.unique(np.linspace(0, len(c.densities) - 1, 120).astype(int))
    grid, linear = density_grid(c)
    limit = None if _preconditioned(c) else c.get("stability/threshold")
    top = c.get("curvature/sharpness")
    out = []
    for s in (c.densities[i] for i in chosen):
        mean, low, high = _curves(s, grid, linear)
        out.append(
            {
                "step": s.step,
                "mean": _short(mean),
                "lo": _short(low),
                "hi": _short(high),
                "limit": _or_none(limit.at(s.step) if limit is not None else math.nan),
                "top": _or_none(top.at(s.step) if top is not None else math.nan),
                "says": _masses(s),
            }
        )
    return {"c": linear, "grid": _short(grid), "samples": out}


def _masses(s: Density) -> str:
    if not len(s.nodes):
        return ""
    largest = float(np.max(np.abs(s.nodes)))
    total = float(np.sum(s.weights)) or 1.0
    below = float(np.sum(s.weights[s.nodes < -1e-3 * largest])) / total
    near = float(np.sum(s.weights[np.abs(s.nodes) <= 1e-3 * largest])) / total
    return f": {words.percent(below, 1)} of the mass below zero, {words.percent(near, 1)} near it"


def _short(values: Floats) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def entropy(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/entropy", "Predictive entropy", "nats, fixed probe batch", "entropy",
        id="entropy", height=120, cls="s1", log=False, says="Mean entropy of the predictions.",
    )  # fmt: skip


def divergence(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/jsd", "Change of predictions",
        "Jensen–Shannon divergence between samples in nats; at most ln 2 = 0.69",
        "change of predictions",
        id="jsd", height=120, cls="s4", says="How much the predictions changed between samples.",
    )  # fmt: skip


def instability(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/instability", "Instability", "JSD + entropy, nats", "instability",
        id="instability", height=120, cls="s5", log=False,
        says="Change of the predictions plus their entropy.",
    )  # fmt: skip
