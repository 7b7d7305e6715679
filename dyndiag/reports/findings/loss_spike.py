"""The loss jumped out of its recent range."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.figures import Figure, Note
from dyndiag.reports.findings.finding import (
    BAI,
    WORTSMAN_LOW,
    WORTSMAN_PROXIES,
    Finding,
    Source,
    Told,
    around,
    end_of,
    evidence,
    judged,
    safe,
    span,
    surety,
    text,
    value,
)
from dyndiag.reports.findings.precursor import (
    BEFORE,
    INTERVENED,
    edge_passed,
    norm_stood,
    precursor,
    same_batch,
    worst_block,
)
from dyndiag.values import Event


def made_up(c: Contents, event: Event) -> bool:
    """Whether the loss came back for good.

    It has if it reached its earlier best again. A run may end, or turn to harder data, before that:
    then the last losses must be within 5 % of the level before, or within its scatter.
    """
    if event.end is None:
        return False
    if math.isfinite(value(event, "steps_to_recover")):
        return True
    before, loss = value(event, "median_before"), c.loss
    if loss is None or not math.isfinite(before):
        return True
    earlier = loss.values[loss.steps < event.start][-24:]
    earlier = earlier[np.isfinite(earlier)]
    scatter = 1.4826 * float(np.median(np.abs(earlier - before))) if len(earlier) else 0.0
    return figures.final(loss) <= before + max(0.05 * abs(before), scatter)


def loss_spike(told: Told, c: Contents) -> Finding:
    event = told.event
    before, peak = value(event, "median_before"), value(event, "peak_value")
    stayed = not made_up(c, event)
    low, high = words.telling([before, peak])
    sure, dots = surety(event)
    start, end = event.start, end_of(c, event)
    window = around(c, start, min(end, event.peak + 40), share=1.0, least=50)
    cause = precursor(c, event)
    at = f"at step {words.steps(start)}"
    jumped = f"The loss jumped from {low} to {high} {at}"
    if event.end is None:
        after = "has not come back" if c.alive else "had not come back when the run ended"
    elif stayed:
        after = "stayed above its old level"
    else:
        after = f"was back {_after(end - start)}"
    return Finding(
        event=event,
        urgency="act" if stayed else "look",
        title=_title(event, jumped, stayed),
        when=_when(c, event),
        sure=sure,
        dots=dots,
        reason=_reason(c, event),
        what=_what(c, event, cause),
        people=_people(c, event, stayed, cause),
        sources=(_source(cause),),
        figures=_figures(c, event, window),
        window=window,
        chapter=_chapter(cause),
        sentence=_sentence(c, event, jumped, after, cause),
        numbers=_numbers(c, event, stayed),
        label=f"Loss spike {words.times(value(event, 'factor', event.severity))}"
        + (f", back at {words.steps(end)}" if not stayed else ", progress lost"),
        short=f"Spike {words.times(value(event, 'factor', event.severity))}",
    )


def _chapter(cause: str) -> str:
    if cause.startswith(("the edge ratio", "the learning rate")):
        return "stability"
    return "logits" if cause.startswith("attention") else "gradients"


def _after(steps: int) -> str:
    return f"{words.count(steps, 'step')} later" if steps else "at once"


def _title(event: Event, jumped: str, stayed: bool) -> str:
    if event.end is None:
        return f"{jumped} and has not come back"
    return f"{jumped} and stayed above its old level" if stayed else f"{jumped} and came back"


def _sentence(c: Contents, event: Event, jumped: str, after: str, cause: str) -> str:
    factor = value(event, "factor", event.severity)
    if abs(factor - 2) < 0.1 and value(event, "median_before") > 0:
        jumped = f"The loss doubled at step {words.steps(event.start)}"
    link = "and" if "," not in after else ","
    said = f"{jumped} {link} {after}"
    if cause.startswith("attention"):
        if after.startswith("was back"):  # a verdict has 25 words
            said = f"{jumped} and came back"
        return f"{said}; {_peaked(c, event)} just before."
    if cause.startswith(("the gradient", "the edge ratio", *INTERVENED)):
        return f"{said}; {cause}."
    if cause == "task switch":
        return f"{said}; a new task had just begun."
    if not cause and _watched(c):
        ratio = _edge_ratio(c, event)
        if ratio is not None and ratio > 1:  # too little for a cause, too much to be called nothing
            return f"{said}; the edge ratio was {words.number(ratio, 3)} just before."
        points = "" if same_batch(c) else ", which points to the data"
        return f"{said}; nothing measured had moved before{points}."
    return f"{said}."


def _when(c: Contents, event: Event) -> str:
    parts = [span(c, event)]
    if event.end is not None and event.peak != event.start:
        parts.append(f"highest at {words.steps(event.peak)}")
    recovered = value(event, "steps_to_recover")
    if math.isfinite(recovered):
        step = event.start + int(recovered)
        parts.append(f"smoothed loss at its earlier best again at step {words.steps(step)}")
    elif event.end is not None:
        parts.append("its earlier best was not reached again")
    return "; ".join(parts)


def _reason(c: Contents, event: Event) -> str:
    parts = []
    deviations = value(event, "deviations")
    if math.isfinite(deviations):
        parts.append(f"{words.number(deviations, 2)} robust deviations above the losses before")
    factor = value(event, "factor", event.severity)
    parts.append(f"{words.number(factor)} times its level")
    reason = ", ".join(parts) + "."
    points = value(event, "points")
    if points == 1:
        reason += " A single value: one hard batch looks the same."
    doubt = text(event, "in_doubt")
    if doubt == "task switch":
        reason += " It began at a switch of tasks, where the loss rises by itself."
    elif doubt:
        reason += f" In doubt: {safe(doubt)}."
    if c.loss is not None:
        reason += f" Median of the last 20 losses: {words.number(figures.final(c.loss))}."
    return reason


def _peaked(c: Contents, event: Event) -> str:
    found = worst_block(c, event)
    assert found is not None  # a precursor was found in it
    name, top, _ = found
    near = words.number(round(top, 1 - len(str(int(top)))) if top >= 1000 else top, 2)
    return f"attention logits in {safe(name, 30)} had peaked near {near}"


def _watched(c: Contents) -> bool:
    """Whether anything besides the loss was measured that could have moved."""
    return "gradients/norm" in c.series


def _what(c: Contents, event: Event, cause: str) -> str:
    if cause.startswith("attention"):
        found = worst_block(c, event)
        assert found is not None
        name, top, series = found
        early = series.within(c.first, c.first + max(20, (event.start - c.first) // 10))
        values = series.within(event.start - BEFORE, event.start - 1)
        steps = series.steps[(series.steps >= event.start - BEFORE) & (series.steps < event.start)]
        at = int(steps[int(np.nanargmax(values))])
        over = series.steps[series.values >= figures.LOGITS]
        return (
            f"Attention logits in {safe(name)} had grown from "
            f"{words.number(float(np.nanmedian(early)))} to {words.number(top)} at step "
            f"{words.steps(at)}, {words.count(event.start - at, 'step')} before; they first passed "
            f"1,000 at step {words.steps(int(over[0]))}. Logits of that size make attention nearly "
            "one-hot and its gradients erratic."
        )
    if cause == "task switch":
        return "The data changed with the task; a higher loss on new data is what one expects."
    if cause.startswith("the run was restarted"):
        return (
            f"{words.capital(cause)}: weights, optimizer state or data that were not restored look "
            "like this."
        )
    if cause.startswith("the learning rate"):
        return (
            f"{words.capital(cause)}: the steps became longer at once, and longer than the loss "
            "there allows."
        )
    edge = edge_passed(c, event)
    if cause.startswith("the edge ratio"):
        adaptive = c.get("curvature/preconditioned_sharpness") is not None
        return (
            f"In the {BEFORE} steps before, the edge ratio had risen to {words.number(edge, 2)}: a "
            "step was longer than the sharpest direction allows, and what lay along it grew from "
            "step to step until the loss showed it."
            + (
                " With Adam that happens in long calm: gradients shrink, the second moment follows "
                "them, and the effective step grows."
                if adaptive
                else ""
            )
        )
    parts = []
    if cause:
        parts.append(f"{words.capital(cause)}: what the loss shows now began there.")
    elif _watched(c):
        seen = ["gradient norm"]
        if figures.attention_names(c)[1]:
            seen.append("attention logits")
        named = words.capital(words.listing([f"the {seen[0]}", *seen[1:]]))
        parts.append(f"{named} had not moved in the steps before.")
        if event.peak - event.start <= 1 and not same_batch(c):
            parts.append("A jump at full height within a step or two points to the data.")
    else:
        parts.append("Only the loss was measured, so the report cannot say what moved first.")
    ratio = _edge_ratio(c, event)
    if ratio is not None:
        parts.append(f"The edge ratio was {words.number(ratio, 3)} just before.")
    return " ".join(parts)


def _edge_ratio(c: Contents, event: Event) -> float | None:
    """The last that was judged in the 50 steps before."""
    ratio = judged(c, "stability/edge_ratio", event.start - BEFORE, event.start - 1)
    return float(ratio[-1]) if len(ratio) else None


def _people(c: Contents, event: Event, stayed: bool, cause: str) -> tuple[str, ...]:
    if cause.startswith("attention"):
        first = (
            (f"Go back to a checkpoint before step {words.steps(event.start - BEFORE)} and lower "
             "the rate.",) if stayed else ("Nothing, if it stays alone.",)
        )  # fmt: skip
        return (
            *first,
            "Normalise queries and keys, or clip their logits.",
            "With Adam, lower β₂ from 0.999 to 0.95–0.99, or clip the gradient.",
        )
    if cause == "task switch":
        return ("Nothing to do, unless earlier tasks suffer: see the accuracies.",)
    if cause.startswith("the run was restarted"):
        return (
            "See that weights, optimizer state, schedule and order of the data are restored.",
            "If this was meant to be a new run, give it a folder of its own: the same folder goes "
            "on with the old one.",
        )
    if cause.startswith("the learning rate"):
        return (
            ("Go back to a checkpoint before it." if stayed else "Nothing, if it stays alone."),
            "Raise the rate less, or over more steps.",
        )
    if cause.startswith("the edge ratio"):
        return (
            "Nothing, if it stays alone and the loss came back.",
            "Lower the rate late in training, or let it decay.",
            "With Adam, raise ε, or lower β₂ so that the second moment rises faster in a jump.",
        )
    stood = norm_stood(c, event)
    begun = min(event.start, stood[0]) if stood is not None else event.start
    last = max(event.start, event.peak)
    steps = (
        f"steps {words.steps(begun)} to {words.steps(last)}"
        if last > begun
        else f"step {words.steps(begun)}"
    )
    first_line = (
        "Go back to a checkpoint before it, and skip the batches or lower the rate."
        if stayed
        else "Nothing, if it stays alone."
    )
    return (
        first_line,
        f"Look at the batches of {steps}.",
        "Skip or clip updates whose gradient norm is far outside its recent range.",
    )


def _source(cause: str) -> Source:
    if cause.startswith("the edge ratio"):
        return BAI
    return WORTSMAN_PROXIES if cause.startswith("attention") else WORTSMAN_LOW


def _numbers(c: Contents, event: Event, stayed: bool) -> str:
    before = value(event, "median_before")
    if c.loss is None or not math.isfinite(before):
        return ""
    last = words.number(figures.final(c.loss))
    return f"It stood at {words.number(before)} before and at {last} in the last 20 steps."


def _figures(c: Contents, event: Event, window: tuple[int, int]) -> tuple[Figure, ...]:
    key = f"spike-{event.start}"
    peak = value(event, "peak_value")
    note: tuple[Note, ...] = ()
    if math.isfinite(peak):
        late = event.peak > (window[0] + window[1]) / 2
        note = (
            Note(
                float(event.peak), f"{words.number(peak)} at step {words.steps(event.peak)}", peak,
                dx=-8 if late else 8, dy=6, anchor="end" if late else "start",
            ),
        )  # fmt: skip
    return evidence(
        figures.loss(c, f"{key}-loss", 130, window, notes=note),
        figures.attention(c, f"{key}-attention", 150, window)
        or figures.gradient_norm(c, f"{key}-gradient", 110, window),
        figures.edge_ratio(c, f"{key}-edge", 110, window),
    )
