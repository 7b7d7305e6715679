"""The last chapters: how sure, what is missing, what it cost, and the facts of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Facts, Item, Shares, Table, Text
from dyndiag.reports.contents import Contents, Estimates, Series

CUT = 2000  # characters of a text that the run facts show
COLOURS = ("s1", "s2", "s3", "s4", "s5")
NAMES = {
    "Sharpness": "sharpness and edge ratio",
    "BatchSharpness": "batch sharpness",
    "Trace": "trace",
    "Density": "spectral density",
    "Predictions": "predictions",
    "RealisedEdge": "realised edge",
    "ContinualAccuracy": "task evaluation",
}
PROMISES = {
    "c": "certified: the largest eigenvalue is at least the value and, at risk 0.1 %, at most the "
    "upper end",
    "p": "provisional: an eigenvalue lies within the residual; a larger one may have been missed",
    "o": "not converged: marked ×, opens no event, enters no median",
}
STATUS = {"c": "certified", "p": "provisional", "o": "not converged"}


def sure(c: Contents) -> Chapter:
    rows: list[tuple[str, ...]] = []
    labels = {
        "curvature/sharpness": "sharpness",
        "curvature/preconditioned_sharpness": "preconditioned sharpness",
        "curvature/smallest": "smallest eigenvalue",
        "stability/edge_ratio": "edge ratio",
    }
    for name, label in labels.items():
        one = c.estimates.get(name)
        if one is None or not len(one):
            continue
        main = figures.main_sharpness(c)
        if (
            name == "stability/edge_ratio"
            and isinstance(main, Estimates)
            and main.status == one.status
        ):
            same = "as of the sharpness, over a threshold that is known exactly"
            rows.append((label, same, "as above", words.steps(len(one)), ""))
        else:
            rows += _statuses(one, label)
    rows += _sampled(c)
    rows += _exact(c)
    table = Table(
        ("quantity", "what the interval means", "typical width", "samples", "products"),
        tuple(rows), (False, False, True, True, True),
    )  # fmt: skip
    lead = "Each curvature value carries an interval. What it promises differs by method."
    if not any(len(one) for one in c.estimates.values()):
        lead = "This run holds no estimates: its values are exact for the batch they were taken on."
    if not rows:
        empty = Absent("Nothing", "the run holds no value yet")
        return Chapter("sure", "How sure each number is", "How sure", "", (empty,), True)
    return Chapter("sure", "How sure each number is", "How sure", lead, (table,))


def _statuses(one: Estimates, label: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    letters = np.array(list(one.status))
    for status, promise in PROMISES.items():
        at = np.flatnonzero(letters == status)
        if not len(at):
            continue
        size = np.abs(one.values[at])
        with np.errstate(divide="ignore", invalid="ignore"):
            width = (one.upper[at] - one.lower[at]) / size
        finite = width[np.isfinite(width)]
        rows.append(
            (
                "" if rows else label,
                promise,
                words.percent(float(np.median(finite)), 2) if len(finite) else "–",
                f"{words.steps(len(at))} {STATUS[status]}",
                "" if rows else words.steps(one.products),
            )
        )
    return rows


def _sampled(c: Contents) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    trace = c.estimates.get("curvature/trace")
    if trace is not None and len(trace):
        with np.errstate(divide="ignore", invalid="ignore"):
            half = (trace.upper - trace.lower) / 2 / np.abs(trace.values)
        finite = half[np.isfinite(half)]
        width = f"± {words.percent(float(np.median(finite)))}" if len(finite) else "–"
        rows.append(
            ("trace", "95 % interval over random probes, Student's t", width,
             words.steps(len(trace)), words.steps(trace.products))
        )  # fmt: skip
    if c.densities:
        rows.append(
            ("density", "band: smallest to largest of the probes; a spread, no confidence interval",
             "see chart", words.steps(len(c.densities)), "")
        )  # fmt: skip
    for task in c.tasks()[:1]:
        count = sum(len(c.series[f"continual/accuracy/{t}"]) for t in c.tasks())
        known = f"continual/samples/{task}" in c.series
        meaning = "95 %, Wilson" if known else "none: the number of samples is not known"
        rows.append(("accuracy", meaning, "see chart", words.steps(count), ""))
    return rows


def _exact(c: Contents) -> list[tuple[str, ...]]:
    groups = (
        ("loss, gradient and update norms, logits", "exact for the step's batch; scatter is the "
         "batch's", ("train/loss", "gradients/norm", "updates/ratio", "logits/max")),
        ("batch sharpness", "exact for the step's batch", ("curvature/batch_sharpness",)),
        ("entropy, JSD", "exact for the probe batch", ("predictions/entropy",)),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for label, meaning, names in groups:
        found = [c.series[name] for name in names if name in c.series]
        if found:
            rows.append((label, meaning, "", words.steps(max(len(one) for one in found)), ""))
    broken = _non_finite(c)
    if broken:
        rows.append(("non-finite values", broken, "", "", ""))
    return rows


def _non_finite(c: Contents) -> str:
    def bad(one: Series) -> int:
        return int(np.sum(~np.isfinite(one.values)))

    counts = {one.name: bad(one) for one in c.series.values()}
    worst = sorted((name for name, n in counts.items() if n), key=lambda n: -counts[n])
    parts = [f"{name} {words.steps(counts[name])}" for name in worst[:5]]
    more = f" and {len(worst) - 5} more series" if len(worst) > 5 else ""
    return ", ".join(parts) + more


def missing(absent: Mapping[str, Absent]) -> Chapter:
    title = "What was not measured, and why"
    if not absent:
        note = Text("Everything that the report has a place for was measured.")
        return Chapter("missing", title, "Not measured", "", (note,))
    rows = tuple((one.what, one.why, one.line) for one in absent.values())
    head = ("not measured", "why", "what would turn it on")
    width = 3 if any(one.line for one in absent.values()) else 2
    table = Table(head[:width], tuple(row[:width] for row in rows), (False,) * width)
    return Chapter("missing", title, "Not measured", "", (table,))


def cost(c: Contents) -> Chapter:
    title, entry = "What the diagnosis cost", "Cost"
    training = c.metadata.get("training_seconds")
    spent = c.metadata.get("cost")
    if not isinstance(training, int | float) or not training or not isinstance(spent, Mapping):
        absent = Absent("Cost", "the run does not say how long it took")
        return Chapter("cost", title, entry, "", (absent,), True)
    parts = [
        (NAMES.get(str(name), str(name)), _number(used, "seconds"), used)
        for name, used in spent.items()
        if isinstance(used, Mapping)
    ]
    parts.sort(key=lambda part: -part[1])
    total = sum(seconds for _, seconds, _ in parts)
    rows = [
        ("training, with what is read off each step", words.duration(training), "100 %", "", "")
    ]
    rows += [
        (
            name,
            words.duration(seconds),
            words.percent(seconds / training, 1 if seconds < 0.1 * training else 0),
            words.steps(int(_number(used, "samples"))),
            words.steps(int(_number(used, "products"))) if _number(used, "products") else "",
        )
        for name, seconds, used in parts
    ]
    colours = ("loss", *(COLOURS[i % len(COLOURS)] for i in range(len(parts))))
    shares = [("training", training / (training + total), "loss")]
    shares += [
        (part[0], part[1] / (training + total), colour)
        for part, colour in zip(parts, colours[1:], strict=True)
    ]
    table = Table(
        ("part", "time", "share of training", "samples", "products"),
        tuple(rows), (False, True, True, True, True), colours,
    )  # fmt: skip
    items: tuple[Item, ...] = (Shares(tuple(shares)), table)
    return Chapter("cost", title, entry, _cost_lead(c, training, total), items)


def _cost_lead(c: Contents, training: float, total: float) -> str:
    budget = c.metadata.get("budget")
    share = total / training
    said = f"Measuring took {words.percent(share, 1)} of the training's time"
    if share >= 2:
        said = f"Measuring took {words.number(share, 2)} times as long as the training"
    if not isinstance(budget, int | float):
        return said + "."
    allowed = words.percent(float(budget), 0 if budget >= 0.01 else 1)
    if share <= budget * 1.05:
        return f"{said}; its budget was {allowed}."
    if total < 3:
        return f"{said}: a short run may spend two seconds, whatever its budget of {allowed}."
    return f"{said}, more than its budget of {allowed}."


def _number(used: Mapping[str, Any], key: str) -> float:
    value = used.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def facts(c: Contents) -> Chapter:
    m = c.metadata
    left = [
        ("model", _model(m.get("model"))),
        ("loss", str(m.get("loss_function") or "")),
        ("optimizer", _optimizer(m.get("optimizer"))),
        ("steps", _steps(c)),
        ("tasks", ", ".join(str(task) for task in m.get("tasks") or ())),
        ("seed", "" if m.get("seed") is None else str(m["seed"])),
        ("command", str(m.get("command") or "")),
        ("commit", str(m.get("git_commit") or "")),
    ]
    right = [
        ("probe batch", _probe(m.get("probe_batch"))),
        ("detectors", _detectors(c)),
        ("started", when(m.get("started"))),
        ("finished", when(m.get("finished")) or "not recorded"),
        ("restarted at step", _restarts(c)),
        ("torch", _versions(m)),
        ("machine", ", ".join(str(m[key]) for key in ("platform", "device") if m.get(key))),
        ("dyndiag", str(m.get("dyndiag") or "")),
    ]
    known = {
        "model", "loss_function", "optimizer", "tasks", "seed", "command", "git_commit",
        "probe_batch", "detectors", "started", "finished", "torch", "platform", "device",
        "threads", "dyndiag", "python", "cost", "training_seconds", "notices", "task_starts",
        "budget", "restarts",
    }  # fmt: skip
    right += [(str(key), _json(value)) for key, value in m.items() if key not in known]
    columns = tuple(
        tuple((name, _cut(text)) for name, text in column if text) for column in (left, right)
    )
    items: list[Item] = [Facts(columns)]
    notices = [note for note in m.get("notices") or () if isinstance(note, Mapping)]
    if notices:
        rows = tuple(
            (words.steps(int(_number(note, "step"))), str(note.get("source") or ""),
             _cut(str(note.get("text") or "")))
            for note in notices[:50]
        )  # fmt: skip
        items.append(
            Table(("at step", "told by", "what was told once"), rows, (True, False, False))
        )
    return Chapter("facts", "Run facts", "Run facts", "", tuple(items))


def when(text: Any) -> str:
    """An ISO time as a date and a time of day in UTC; anything else as it is.

    >>> when("2026-11-21T09:42:10+00:00")
    '21 November 2026, 09:42 UTC'
    """
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text or "")
    if time.tzinfo is not None:
        time = time.astimezone(UTC)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"


def _model(model: Any) -> str:
    if not isinstance(model, Mapping):
        return str(model or "")
    parts = [str(model.get("class") or "")]
    if isinstance(model.get("parameters"), int):
        parts.append(f"{model['parameters']:,} parameters")
        if model.get("trainable") not in (None, model["parameters"]):
            parts.append(f"{model['trainable']:,} trainable")
    return ", ".join(part for part in parts if part)


def _optimizer(optimizer: Any) -> str:
    if not isinstance(optimizer, Mapping):
        return str(optimizer or "")
    groups = [group for group in optimizer.get("groups") or () if isinstance(group, Mapping)]
    shown = []
    for group in groups[:3]:
        settings = ", ".join(
            f"{key} {words.plain(value) if isinstance(value, float) else _json(value)}"
            for key, value in group.items()
            if value not in (None, False, 0) and not isinstance(value, bool)
        )
        shown.append(settings)
    more = f"; {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return (
        ": ".join(part for part in (str(optimizer.get("class") or ""), "; ".join(shown)) if part)
        + more
    )


def _steps(c: Contents) -> str:
    if not c.rows:
        return "none"
    many = words.steps(c.last - c.first + 1)
    return many if c.first == 0 else f"{many}, from {words.steps(c.first)} to {words.steps(c.last)}"


def _probe(probe: Any) -> str:
    if not isinstance(probe, Mapping):
        return str(probe or "")
    return ", ".join(
        part
        for part in (words.steps(int(_number(probe, "size"))), str(probe.get("description") or ""))
        if part
    )


def _detectors(c: Contents) -> str:
    counts: dict[str, int] = {}
    for event in c.events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    found = ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())) or "no event"
    how = {
        "agrees": "replay agrees with what was said live",
        "disagrees": "replay disagrees with what was said live; the replay's events are shown",
    }.get(c.replay, c.replay)
    return f"{found}; {how}" if how else found


def _restarts(c: Contents) -> str:
    steps = [words.steps(step) for step in c.restarts]
    return words.listing(steps if len(steps) < 9 else [*steps[:8], f"{len(steps) - 8} more"])


def _versions(m: Mapping[str, Any]) -> str:
    parts = [
        str(m["torch"]) if m.get("torch") else "",
        f"Python {m['python']}" if m.get("python") else "",
    ]
    if m.get("threads"):
        parts.append(words.count(int(_number(m, "threads")), "thread"))
    return ", ".join(part for part in parts if part)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]}… ({len(text):,} characters)"
