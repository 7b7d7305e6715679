"""The policy's entropy rose to a multiple of its start."""

from __future__ import annotations

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.entropy_collapse import CUI, policy_figures
from dyndiag.reports.findings.finding import (
    Finding,
    Told,
    around,
    end_of,
    judged,
    span,
    surety,
    value,
)


def entropy_explosion(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    word, dots = surety(event)
    window = around(c, event.start, end, least=100)
    start, highest = value(event, "start_value"), value(event, "peak_value")
    threshold = value(event, "threshold")
    at = f"step {words.steps(event.start)}"
    above = int((judged(c, "policy/entropy", event.start, end) > threshold).sum())
    grew = f"The policy's entropy rose to {words.number(event.severity, 2)} times its start"
    came = "and has not come back" if event.end is None else "and came back"
    return Finding(
        event=event,
        urgency="act" if event.end is None else "look",
        title=f"{grew} {came}",
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=f"{words.count(above, 'sample')} lay above {words.number(threshold, 2)} nats, "
        "twice the mean of the first ten.",
        what="The policy is unlearning what text looks like: the longer the sequences, the sooner "
        "they end in noise, and the reward with them.",
        people=(
            f"Go back to a checkpoint before {at}.",
            "Lower the rate or the entropy bonus, raise the weight of the reference.",
            "Look at samples of the generated text, and at tokens with a large ratio.",
        ),
        sources=(CUI,),
        figures=policy_figures(c, f"explosion-{event.start}", window),
        window=window,
        chapter="others",
        sentence=f"{grew} from {at} on, {came}.",
        numbers=f"It began at {words.number(start)} nats a token; the highest was "
        f"{words.number(highest)}, at step {words.steps(event.peak)}.",
        label=f"Entropy explosion {words.times(event.severity)}",
        short="Entropy explosion",
    )
