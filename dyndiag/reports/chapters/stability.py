"""Sharpness against its threshold, and the spectrum that it tops."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.chapters.items import Absent, Chapter, Item, Text, charts, gaps
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.precursor import same_batch


def stability(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    items: list[Item] = charts([figures.sharpness(c)])
    first: tuple[str, ...] = ("sharpness", "threshold")
    empty = "sharpness" in absent and "threshold" in absent and "trace" in absent
    last: tuple[str, ...] = ("batch_sharpness", "trace")
    if empty:
        first, last = first + last, ()
    items += gaps(absent, first)
    items += _notes(c)
    items += charts(
        [
            figures.edge_ratio(c, id="ratio", height=140),
            _plain_sharpness(c),
            figures.plain_line(
                c, "curvature/batch_sharpness", "Batch sharpness",
                "gᵀHg / gᵀg on the step's own batch", "batch sharpness",
                id="batch", height=130, cls="s3", says="Curvature along the batch's own gradient.",
            ),
            figures.trace(c),
        ]
    )  # fmt: skip
    items += gaps(absent, last)
    return Chapter("stability", "Stability", "Stability", _lead(c, empty), tuple(items), empty)


def _plain_sharpness(c: Contents) -> figures.Figure | None:
    """λ₁ itself, where the chart above shows the preconditioned one."""
    if c.get("curvature/preconditioned_sharpness") is None:
        return None
    one = c.estimates.get("curvature/sharpness")
    if one is None or not len(one):
        return None
    mark = figures.Mark("est", one.name, "sharpness", "s1")
    y = figures.scale(one.values, zero=True)
    unit = "loss per squared parameter" + (", log scale" if y.get("type") == "log" else "")
    drawn = figures.Drawn(one.name, one, one.lower, one.upper, one.status)
    return figures.Figure(
        "plain", "Sharpness", unit, 140, (mark,), (drawn,), y,
        says="Largest Hessian eigenvalue, without the preconditioner.",
    )  # fmt: skip


def _lead(c: Contents, empty: bool) -> str:
    if empty:
        return ""
    dots = "Dots are single samples, the band is the certified interval."
    formula = figures.formula(c)
    if figures.main_sharpness(c) is None or c.get("stability/edge_ratio") is None:
        return "The largest Hessian eigenvalue of the probe batch's loss. " + dots
    if c.get("curvature/preconditioned_sharpness") is not None:
        start = (
            "Sharpness is taken in the geometry of the optimizer's preconditioner; the step is "
            "locally stable while it stays below the threshold."
        )
    elif formula == "2/η":
        start = (
            "Gradient descent at rate η is locally stable while the largest Hessian eigenvalue "
            "stays below 2/η."
        )
    elif formula != "threshold":
        start = (
            f"Gradient descent with momentum β is locally stable while the largest Hessian "
            f"eigenvalue stays below {formula}."
        )
    else:
        start = "The step is locally stable while the edge ratio stays below 1."
    if _minibatch(c):
        dots = "On minibatches a ratio near 1 counts as a hint only. " + dots
    return f"{start} {dots}"


def _minibatch(c: Contents) -> bool:
    full = c.series.get("stability/full_batch")
    return full is not None and len(full) > 0 and float(np.nanmedian(full.values)) == 0.0


def _notes(c: Contents) -> list[Item]:
    out: list[Item] = []
    warm = c.series.get("stability/warmup")
    ratio = c.get("stability/edge_ratio")
    if warm is not None and ratio is not None and np.any(warm.values == 1):
        warming = warm.steps[warm.values == 1]
        one = len(warming) == 1
        head = "The first sample" if one else f"The first {words.count(len(warming), 'sample')}"
        until = f"up to step {words.steps(int(warming[-1]))}"
        out.append(
            Text(
                f"{head}, {until}, {'lies' if one else 'lie'} in the optimizer's warm-up: drawn, "
                "but not judged, and opening no event."
            )
        )
    size = c.metadata.get("probe_batch")
    if ratio is not None and isinstance(size, Mapping) and size.get("size"):
        batch = words.steps(int(size["size"]))
        out.append(
            Text(
                f"Measured on the batch of {batch} that every step was taken on."
                if same_batch(c)
                else f"Measured on a fixed probe batch of {batch}; the sharpness of a small probe "
                "batch lies above that of all the data."
            )
        )
    return out


def spectrum(c: Contents, absent: Mapping[str, Absent]) -> Chapter:
    items: list[Item] = charts([figures.spectrum(c), figures.density(c)])
    empty = "density" in absent
    lead = ""
    if empty:
        items.append(absent["density"])
    else:
        low = [float(d.nodes.min()) for d in c.densities if len(d.nodes)]
        lead = "How the eigenvalues of the Hessian are spread, by Lanczos quadrature."
        if low and min(low) < 0:
            lead += f" The most negative lie near {words.number(min(low), 2)}."
    return Chapter("spectrum", "Spectrum over time", "Spectrum", lead, tuple(items), empty)
