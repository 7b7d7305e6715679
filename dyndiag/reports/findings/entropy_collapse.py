"""The policy's entropy fell to a small part of its start, or was about to."""

from __future__ import annotations

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.figures import Figure
from dyndiag.reports.findings.finding import (
    Finding,
    Source,
    Told,
    around,
    end_of,
    evidence,
    judged,
    span,
    surety,
    text,
    value,
)
from dyndiag.values import Event

CUI = Source(
    "Cui et al.",
    "The entropy mechanism of reinforcement learning for reasoning language models",
    2025,
    "https://arxiv.org/abs/2505.22617",
)
DAPO = Source(
    "Yu et al.",
    "DAPO: an open-source LLM reinforcement learning system at scale",
    2025,
    "https://arxiv.org/abs/2503.14476",
)


def entropy_collapse(told: Told, c: Contents) -> Finding:
    event = told.event
    word, dots = surety(event)
    window = around(c, event.start, end_of(c, event), least=100)
    start, lowest = value(event, "start_value"), value(event, "peak_value")
    ahead = text(event, "by") == "trend"
    there = lowest < value(event, "threshold")
    at = f"step {words.steps(event.start)}"
    share = words.percent(lowest / start)
    fell = f"The policy's entropy fell to {share} of its start"
    title = fell if there else "The policy's entropy was on its way to a tenth of its start"
    came = "and has not come back" if event.end is None else "and came back"
    return Finding(
        event=event,
        urgency="look",
        title=f"{title} {came}" if there else title,
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=_reason(c, event, ahead, there),
        what="A policy this certain generates nearly the same text every time: groups of samples "
        "get equal rewards, advantages vanish, and nothing new is tried.",
        people=(
            "Widen the upper clip bound (0.28 in place of 0.2), or add a bonus or a target for "
            "entropy.",
            "Raise the temperature of the samples, or the weight of the reference.",
            f"If the reward has stopped rising, go back to a checkpoint before {at}.",
        ),
        sources=(CUI, DAPO),
        figures=policy_figures(c, f"collapse-{event.start}", window),
        window=window,
        chapter="others",
        sentence=f"{fell} from {at} on, {came}."
        if there
        else f"From {at} on the policy's entropy was falling towards a tenth of its start.",
        numbers=f"It began at {words.number(start)} nats a token; the lowest was "
        f"{words.number(lowest)}, at step {words.steps(event.peak)}.",
        label=f"Entropy collapse, to {share}",
        short="Entropy collapse",
    )


def _reason(c: Contents, event: Event, ahead: bool, there: bool) -> str:
    threshold = value(event, "threshold")
    below = int((judged(c, "policy/entropy", event.start, end_of(c, event)) < threshold).sum())
    level = f"{words.count(below, 'sample')} lay below {words.number(threshold, 2)} nats"
    trend = "its trend led below a tenth of its start within 100 steps"
    if not ahead:
        return f"{level}, a tenth of the mean of the first ten."
    if there:
        return f"{trend}, and {level}."
    return f"{trend}; it has not come to that{' and no longer does' if event.end else ''}."


def policy_figures(c: Contents, id: str, window: tuple[int, int]) -> tuple[Figure, ...]:
    """What was measured of the policy around an event."""
    return evidence(
        figures.plain_line(
            c, "policy/entropy", "Policy entropy", "nats a token", "policy entropy",
            id=id, height=140, cls="s1", window=window,
        ),
        figures.plain_line(
            c, "policy/kl_reference", "Distance from the reference", "KL, nats a token", "KL",
            id=f"{id}-kl", height=100, cls="s4", log=False, window=window,
        ),
        figures.plain_line(
            c, "policy/clip_share", "Clipped tokens", "share of tokens", "clipped tokens",
            id=f"{id}-clip", height=100, cls="s5", log=False, window=window,
        ),
    )  # fmt: skip
