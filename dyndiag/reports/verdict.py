"""The first thing a reader sees: one sentence, then two of numbers."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents, Estimates
from dyndiag.reports.findings import UNDECIDED, Findings, findings, folded
from dyndiag.reports.findings.edge_of_stability import course
from dyndiag.reports.findings.edge_of_stability import sentence as edge_sentence
from dyndiag.reports.findings.finding import Finding, Told
from dyndiag.reports.findings.precursor import (
    INTERVENED,
    edge_passed,
    precursor,
)
from dyndiag.reports.findings.vanishing import vanishing
from dyndiag.reports.quiet import no_progress, nothing

WORDS = 25  # at most so many in a verdict


def verdict(c: Contents) -> str:
    """What happened, as a person would say it: the worst finding's sentence, past tense."""
    if not c.rows:
        return "The run is empty: nothing has been written yet." if c.alive else "The run is empty."
    found = findings(c)
    if not found.told:
        return nothing(c, found)
    worst = found.told[0]
    said = _said(c, worst, found)
    second = _second(c, worst, found)
    if second and len(f"{said} {second}".split()) <= WORDS + 5 and ";" not in said:
        return f"{said.removesuffix('.')}; {second}"
    return said


def _said(c: Contents, worst: Finding, found: Findings) -> str:
    same = [one for one in (*found.told, *found.more) if one.event.kind == worst.event.kind]
    if worst.event.kind == "edge_of_stability":
        return edge_sentence(c, _stays(c))
    if worst.event.kind == "loss_spike" and worst.urgency == "look" and len(same) > 1:
        steps = words.steps(worst.event.start)
        factor = words.number(worst.event.severity, 2)
        if all(edge_passed(c, one.event) for one in same):
            return (
                f"The loss jumped {words.often(len(same))}, up to {factor}-fold, and came back; "
                "each time the edge ratio had passed 1 before."
            )
        cause = precursor(c, worst.event)
        why = (
            ", as a new task began"
            if cause == "task switch"
            else f": {cause}"
            if cause.startswith(INTERVENED)
            else ""
        )
        return (
            f"The loss jumped {words.often(len(same))} and came back each time; the highest, "
            f"at step {steps}, was {factor}-fold{why}."
        )
    if worst.event.kind == "probe_failed" and len(same) > 1:
        many = words.count(c.last - c.first + 1, "step")
        probes = words.count(len(same), "probe")
        return f"{words.capital(probes)} failed; nothing else happened in {many}."
    return worst.sentence


def _stays(c: Contents) -> list[Told]:
    return [
        told
        for told in folded(c.events, c)
        if told.event.kind == "edge_of_stability" and told.event.confidence >= UNDECIDED
    ]


def _second(c: Contents, worst: Finding, found: Findings) -> str:
    """A second clause, for another kind that must not be missed below a worse one."""
    for one in found.told[1:]:
        if one.event.kind != worst.event.kind and one.urgency in ("act", "look"):
            return {
                "stability_gap": f"a stability gap follows at step {words.steps(one.event.start)}.",
                "loss_spike": f"the loss also jumped at step {words.steps(one.event.start)}.",
                "divergence": f"the loss left for good at step {words.steps(one.event.start)}.",
            }.get(one.event.kind, "")
    return ""


def numbers(c: Contents, found: Findings) -> str:
    """Two sentences of numbers below the verdict."""
    if not c.rows:
        return ""
    if found.told and found.told[0].numbers:
        worst = found.told[0]
        if worst.event.kind == "edge_of_stability":
            return course(c, _stays(c))
        also = next(
            (
                one
                for one in found.told[1:]
                if one.event.kind == worst.event.kind == "loss_spike" and one.urgency == "look"
            ),
            None,
        )
        if also is None or worst.urgency != "act":
            return worst.numbers
        return f"{worst.numbers} {_earlier(also)}"
    faint = vanishing(c) if no_progress(c) else ""
    return " ".join(part for part in (_course(c), faint or _sampling(c)) if part)


def _earlier(one: Finding) -> str:
    event = one.event
    peak = event.details.get("peak_value")
    to = f", to {words.number(float(peak), 2)}" if isinstance(peak, int | float) else ""
    after = f" and was over in {words.count(event.end - event.start, 'step')}" if event.end else ""
    came = ", came from one step to the next" if event.peak - event.start <= 1 else ""
    at = f"Another jump{to} at step {words.steps(event.start)}"
    return f"{at}{came}{after}." if came or after else f"{at} followed."


def _course(c: Contents) -> str:
    if c.loss is None or not len(c.loss):
        return "No loss was recorded."
    start, end = figures.first(c.loss), figures.final(c.loss)
    if not math.isfinite(start):
        return ""
    if start == end or len(c.loss) == 1:
        return f"The loss was {words.number(end)}."
    low, high = words.telling([start, end])
    return f"The loss {'fell' if end < start else 'rose'} from {low} to {high}."


def _sampling(c: Contents) -> str:
    """How often curvature was looked at, where that is seldom."""
    one = figures.main_sharpness(c)
    if one is None or len(one) < 2:
        return ""
    if one.steps[-1] - c.first < 0.5 * (c.last - c.first):
        many = words.often(len(one))
        return (
            f"Curvature was sampled {many}, for the last time at step "
            f"{words.steps(int(one.steps[-1]))}; of later steps the report knows only loss and "
            "gradients."
        )
    apart = float(np.median(np.diff(one.steps)))
    low, high = float(np.nanmin(one.values)), float(np.nanmax(one.values))
    if apart >= 100:
        budget = c.metadata.get("budget")
        allowed = (
            f", as its budget of {words.percent(float(budget))} allows"
            if isinstance(budget, int | float)
            else ""
        )
        return (
            f"Curvature was sampled every {words.number(apart, 1)} steps or so{allowed}; between "
            "samples the report knows only loss and gradients."
        )
    kind = "" if isinstance(one, Estimates) else " (without error bars)"
    what = words.capital(figures.sharpness_name(c))
    return f"{what} lay between {words.number(low, 2)} and {words.number(high, 2)}{kind}."
