"""What had moved before the loss jumped."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents, Series
from dyndiag.reports.findings.finding import judged, text
from dyndiag.values import Event

BEFORE = 50  # steps in which a precursor is looked for
RESTARTED = 20  # steps in which what was not restored shows itself
RAISED = 1.5  # a rate that rises so many times at once is no schedule's slow change


INTERVENED = ("the run was restarted", "the learning rate")
"""How `intervened` begins."""


def precursor(c: Contents, event: Event) -> str:
    """What had moved in the 50 steps before, as words; empty if nothing measured had.

    A restart; a learning rate that was raised; attention logits above 1,000 that had grown
    threefold since the run's first tenth; an edge ratio above 1.2 that had been below 1 before (at
    the edge it hovers near 1 and tells nothing); a gradient norm that in the steps before (not the
    spike's own) stood four times above its median of 200.
    """
    if text(event, "in_doubt") == "task switch":
        return "task switch"
    intervention = intervened(c, event)
    if intervention:
        return intervention
    first = event.start - BEFORE
    found = worst_block(c, event)
    if found is not None:
        name, _, series = found
        early = series.within(c.first, c.first + max(20, (event.start - c.first) // 10))
        top = np.nanmax(series.within(first, event.start - 1))
        if top >= figures.LOGITS and (not len(early) or top >= 3 * np.nanmedian(early)):
            return f"attention logits in {name}"
    if edge_passed(c, event):
        return "the edge ratio had passed 1"
    stood = norm_stood(c, event)
    if stood is not None:
        step, ratio = stood
        return (
            f"the gradient norm had stood {words.number(ratio, 2)} times above its median at step "
            f"{words.steps(step)}"
        )
    return ""


def intervened(c: Contents, event: Event) -> str:
    """What was done to the run shortly before, in words: a restart, or a raised learning rate."""
    step = restarted(c, event)
    if step is not None:
        return f"the run was restarted at step {words.steps(step)}"
    raised = rate_raised(c, event)
    if raised is None:
        return ""
    return raised_text(*raised)


def restarted(c: Contents, event: Event) -> int | None:
    """The step at which the run was last gone on with, up to 20 steps before the event."""
    near = [step for step in c.restarts if step <= event.start <= step + RESTARTED]
    return max(near, default=None)


def norm_stood(c: Contents, event: Event) -> tuple[int, float] | None:
    """The step of the ten before at which the gradient norm was largest, and how many times its
    median of the 200 before that it was; None if not above four times."""
    series = c.series.get("gradients/norm")
    if series is None:
        return None
    usual = series.within(event.start - BEFORE - 200, event.start - BEFORE - 1)
    usual = usual[np.isfinite(usual)]
    near = (series.steps >= event.start - 10) & (series.steps < event.start)
    near &= np.isfinite(series.values)
    if len(usual) < 20 or not near.any():
        return None
    recent, median = series.values[near], float(np.median(usual))
    largest = int(np.argmax(recent))
    if not recent[largest] > 4 * median:
        return None
    return int(series.steps[near][largest]), float(recent[largest] / median)


def rate_raised(c: Contents, event: Event) -> tuple[int, float] | None:
    """The last of `raises` at or up to 50 steps before the event's start."""
    near = [one for one in raises(c) if event.start - BEFORE <= one[0] <= event.start]
    return near[-1] if near else None


def raises(c: Contents) -> list[tuple[int, float]]:
    """The steps at which the learning rate was raised by half or more, and by which factor; a
    warm-up, which rises at every step, is none."""
    series = c.series.get("train/learning_rate")
    if series is None or len(series) < 3:
        return []
    first, before, rates = series.values[:-2], series.values[1:-1], series.values[2:]
    raised = np.flatnonzero((rates >= RAISED * before) & (before <= first) & (before > 0))
    return [(int(series.steps[i + 2]), float(rates[i] / before[i])) for i in raised]


def raised_text(step: int, factor: float) -> str:
    return f"the learning rate had risen {words.number(factor, 2)}-fold at step {words.steps(step)}"


def edge_passed(c: Contents, event: Event) -> float:
    """The highest edge ratio of the 50 steps before, if that is a precursor; else 0."""
    recent = judged(c, "stability/edge_ratio", event.start - BEFORE, event.start - 1)
    earlier = judged(c, "stability/edge_ratio", c.first, event.start - BEFORE - 1)
    top = float(recent.max()) if len(recent) else 0.0
    return top if top > 1.2 and len(earlier) and float(earlier.min()) < 1 else 0.0


def worst_block(c: Contents, event: Event) -> tuple[str, float, Series] | None:
    """The block with the largest attention logit in the 50 steps before: name, value, series."""
    prefix, modules = figures.attention_names(c)
    best: tuple[str, float, Series] | None = None
    for module in modules:
        series = c.series[prefix + module]
        values = series.within(event.start - BEFORE, event.start - 1)
        values = values[np.isfinite(values)]
        if len(values) and (best is None or values.max() > best[1]):
            best = (module, float(values.max()), series)
    return best


def same_batch(c: Contents) -> bool:
    """Whether every step was taken on the probe batch: then no bad batch explains a jump."""
    flags = c.series.get("stability/full_batch")
    return flags is not None and len(flags.values) > 0 and bool(np.all(flags.values == 1))
