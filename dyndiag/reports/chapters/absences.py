"""What was not measured, and why: asked by each chapter, and listed in one."""

from __future__ import annotations

from collections.abc import Mapping

from dyndiag.reports import words
from dyndiag.reports.chapters.items import Absent
from dyndiag.reports.contents import Contents

SHARPNESS = ("curvature/sharpness", "curvature/preconditioned_sharpness")
LOSS_LINE = "dyndiag.Monitor(model, optimizer, loss_fn, run=…, probe_batch=batch)"


def absences(c: Contents) -> dict[str, Absent]:
    """Every quantity of the report that this run does not have, by a short name."""
    found = {
        "loss": _loss(c),
        "sharpness": _curvature(c, "Sharpness", SHARPNESS, "Sharpness"),
        "threshold": _threshold(c),
        "batch_sharpness": _batch_sharpness(c),
        "trace": _curvature(c, "Hessian trace", ("curvature/trace",), "Trace"),
        "density": _curvature(c, "Spectral density", (), "Density") if not c.densities else None,
        "gradients": _simple(
            c, "Gradient norm", ("gradients/norm", "gradients/norm_clipped"),
            "no gradient was seen before a step of the optimizer", "monitor.step(loss=loss)",
        ),
        "clipped": _clipped(c),
        "updates": _simple(
            c, "Update ratio", ("updates/ratio",), "no step of the optimizer was seen whole", "",
        ),
        "logits": _simple(
            c, "Output logits", ("logits/max", "logits/log_partition"),
            "the model's output holds nothing that looks like class scores", "",
        ),
        "attention": _attention(c),
        "predictions": _curvature(
            c, "Predictions", ("predictions/entropy",), "Predictions",
            "the output holds no class scores, so there is no entropy or divergence to take",
        ),
        "tasks": None if c.tasks() else _tasks(c),
    }  # fmt: skip
    return {name: absent for name, absent in found.items() if absent is not None}


def imported(c: Contents) -> bool:
    """Whether the run was read from somebody else's log."""
    return "dyndiag" not in c.metadata


def _has(c: Contents, names: tuple[str, ...]) -> bool:
    return any((one := c.get(name)) is not None and len(one) for name in names)


def _notice(c: Contents, source: str, about: str = "") -> str:
    """What was told by that source (and about that), as a clause."""
    for notice in c.metadata.get("notices") or ():
        if not isinstance(notice, Mapping) or notice.get("source") != source:
            continue
        text = str(notice.get("text") or "")
        if about in text:
            return text[:400].rstrip(".")
    return ""


def _simple(c: Contents, what: str, names: tuple[str, ...], why: str, line: str) -> Absent | None:
    if _has(c, names):
        return None
    if imported(c):
        return Absent(what, "the log that this run was read from does not hold it")
    return Absent(what, _notice(c, "StepWatch") or why, line)


def _loss(c: Contents) -> Absent | None:
    return _simple(
        c, "Loss", ("train/loss",), "no loss was passed or seen", "monitor.step(loss=loss)"
    )


def _curvature(
    c: Contents,
    what: str,
    names: tuple[str, ...],
    probe: str,
    otherwise: str = "",
    line: str = "",
) -> Absent | None:
    """Quantities that take passes of their own."""
    if names and _has(c, names):
        return None
    if imported(c):
        return Absent(what, "the log that this run was read from does not hold it")
    failed = c.series.get(f"failures/{probe}")
    if failed is not None and len(failed):
        told = _notice(c, probe, "failed")
        times = words.count(len(failed), "sample")
        return Absent(what, told or f"{times} failed, the first at step {failed.steps[0]:,}")
    told = _notice(c, "Monitor", "no curvature")
    if told:
        return Absent(what, told, LOSS_LINE)
    told = _notice(c, "Monitor", "no trainable parameter")
    if told:
        return Absent(what, told)
    if c.rows == 0:
        return Absent(what, "the run ended before its first step")
    if otherwise:
        return Absent(what, otherwise, line)
    budget = c.metadata.get("budget")
    more = ""
    if isinstance(budget, int | float) and budget > 0:
        more = f"dyndiag.Monitor(…, budget={words.plain(10 * budget).replace(',', '')})"
    if c.alive:
        return Absent(what, "its first sample is not due yet", more)
    return Absent(what, "the run ended before its first sample was due", more)


def _batch_sharpness(c: Contents) -> Absent | None:
    names = ("curvature/batch_sharpness",)
    if _has(c, ("stability/realised_edge",)) or _spent(c, "RealisedEdge"):  # it needs a batch too
        return _curvature(c, "Batch sharpness", names, "BatchSharpness")
    return _curvature(
        c, "Batch sharpness", names, "BatchSharpness",
        "no training batch was seen whole", "monitor.step(loss=loss, batch=batch)",
    )  # fmt: skip


def _spent(c: Contents, probe: str) -> bool:
    """Whether the probe has taken passes."""
    cost = c.metadata.get("cost")
    return isinstance(cost, Mapping) and probe in cost


def _threshold(c: Contents) -> Absent | None:
    if _has(c, ("stability/edge_ratio",)):
        return None
    if not _has(c, SHARPNESS):
        return _curvature(c, "Edge ratio", (), "Sharpness")
    optimizer = c.metadata.get("optimizer")
    rule = str(optimizer.get("rule") or "") if isinstance(optimizer, Mapping) else ""
    reason = _notice(c, "Sharpness", "no threshold").removeprefix(
        "no threshold and no edge ratio: "
    )
    reason = reason or rule.removeprefix("unknown").removeprefix(": ")
    return Absent(
        "Threshold and edge ratio",
        "for this optimizer no threshold is known" + (f": {reason}" if reason else ""),
    )


def _clipped(c: Contents) -> Absent | None:
    if _has(c, ("gradients/norm_clipped",)) or not _has(c, ("gradients/norm",)):
        return None
    return Absent("Gradient norm after clipping", "no clipping was seen in this run")


def _attention(c: Contents) -> Absent | None:
    if any(c.parts.get(prefix) for prefix in c.parts if prefix.startswith("attention/")):
        return None
    if imported(c):
        return Absent("Attention logits", "the log that this run was read from does not hold them")
    told = _notice(c, "AttentionLogits") or _notice(c, "attention")
    return Absent("Attention logits", told or "no attention layer was seen at work in the model")


def _tasks(c: Contents) -> Absent:
    if imported(c):
        return Absent("Accuracy by task", "the log that this run was read from names no tasks")
    failed = c.series.get("failures/ContinualAccuracy")
    if failed is not None and len(failed):
        return Absent(
            "Accuracy by task", _notice(c, "ContinualAccuracy", "failed") or "its probe failed"
        )
    return Absent(
        "Accuracy by task", "no task was declared", 'monitor.start_task("B", eval_batches=batches)'
    )
