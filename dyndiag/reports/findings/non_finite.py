"""A value became NaN or infinite."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import (
    Finding,
    Source,
    Told,
    around,
    end_of,
    evidence,
    module,
    safe,
    span,
    surety,
    text,
    value,
)
from dyndiag.reports.findings.precursor import intervened
from dyndiag.values import Event

MICIKEVICIUS = Source(
    "Micikevicius et al.", "Mixed precision training", 2018, "https://arxiv.org/abs/1710.03740"
)


def non_finite(told: Told, c: Contents) -> Finding:
    event = told.event
    end = end_of(c, event)
    word, dots = surety(event)
    window = around(c, event.start, min(end, event.start + 60), share=0.5, least=60)
    first = _first(event)
    what = _name(first)
    in_all = words.count(int(event.severity), "series", "series")
    became = text(event, "value").lower().replace("nan", "NaN").replace("inf", "infinite") or "NaN"
    return Finding(
        event=event,
        urgency="act",
        title=f"{words.capital(what)} became {became} at step {words.steps(event.start)}",
        when=span(c, event),
        sure=word,
        dots=dots,
        reason=f"the values themselves; {in_all} in all.",
        what=_what(c, event),
        people=(
            f"Go back to a checkpoint before step {words.steps(event.start)}; weights that a "
            "non-finite gradient reached are lost.",
            "Look at that step's batch, and at what was largest just before.",
            "In half precision: a gradient scaler, or bfloat16.",
        ),
        sources=(MICIKEVICIUS,),
        figures=evidence(
            figures.loss(c, f"broken-{event.start}-loss", 130, window),
            figures.gradient_norm(c, f"broken-{event.start}-gradient", 110, window),
            figures.attention(c, f"broken-{event.start}-attention", 110, window),
        ),
        window=window,
        chapter="logits" if first.startswith(("attention", "logits")) else "gradients",
        sentence=_sentence(c, event, first, became).removesuffix(".") + _cause(c, event),
        numbers=_numbers(c, event),
        label="Non-finite" + ("" if event.end is None else f", until {words.steps(end)}"),
        short="Non-finite",
    )


def _first(event: Event) -> str:
    """The first series; one module's gradient rather than the whole norm that it spoils."""
    first = text(event, "first") or (event.series[0] if event.series else "a value")
    modules = [name for name in event.series if name.startswith("gradients/norm/")]
    return modules[0] if first == "gradients/norm" and len(modules) == 1 else first


def _name(series: str) -> str:
    """A series in words: "the gradient of blocks.3.mlp"."""
    for prefix, what in (
        ("gradients/norm/", "the gradient of "),
        ("updates/ratio/", "the update of "),
        ("attention/logit_max_sampled/", "the attention logit of "),
        ("attention/logit_max/", "the attention logit of "),
    ):
        if series.startswith(prefix):
            return what + module(series.removeprefix(prefix))
    known = {
        "train/loss": "the loss",
        "gradients/norm": "the gradient norm",
        "gradients/norm_clipped": "the clipped gradient norm",
        "updates/ratio": "the update",
        "logits/max": "the largest logit",
        "logits/log_partition": "the log partition",
        "curvature/sharpness": "the sharpness",
        "curvature/preconditioned_sharpness": "the preconditioned sharpness",
        "curvature/batch_sharpness": "the batch sharpness",
        "curvature/trace": "the Hessian trace",
        "predictions/entropy": "the predictions' entropy",
        "predictions/loss": "the loss on the probe batch",
    }
    return known.get(series, safe(series))


def _sentence(c: Contents, event: Event, first: str, became: str) -> str:
    at = value(event, "loss_at")
    if first == "train/loss" and event.start == c.first:
        return f"The loss was {became} from the first step on."
    if first == "train/loss":
        others = [name for name in event.series if name != first]
        with_it = f", together with {_name(others[0])}" if others else ""
        return f"The loss became {became} at step {words.steps(event.start)}{with_it}."
    if not math.isfinite(at):
        return f"{words.capital(_name(first))} became {became} at step {words.steps(event.start)}."
    earlier = int(at) - event.start
    when = "at the same step" if earlier == 0 else f"{words.count(earlier, 'step')} earlier"
    return (
        f"The loss became NaN at step {words.steps(int(at))}; the first non-finite value was "
        f"{_name(first)}, {when}."
    )


def _cause(c: Contents, event: Event) -> str:
    intervention = intervened(c, event)
    return f"; {intervention}." if intervention else "."


def _what(c: Contents, event: Event) -> str:
    names = words.listing([_name(name) for name in event.series])
    many = int(event.severity)
    later = many - len(event.series)
    more = f"; {words.count(later, 'series', 'series')} more in all" if later > 0 else ""
    parts = [f"At the first step: {names}{more}."]
    norm = c.series.get("gradients/norm")
    if norm is not None:
        before = norm.within(event.start - 20, event.start - 1)
        usual = norm.within(event.start - 220, event.start - 21)
        before, usual = before[np.isfinite(before)], usual[np.isfinite(usual)]
        if len(before) and len(usual) > 10:
            ratio = float(before.max() / np.median(usual))
            said = (
                f"had grown to {words.number(ratio, 2)} times its median"
                if ratio > 3
                else "had not moved"
            )
            parts.append(f"In the 20 steps before, the gradient norm {said}.")
    return " ".join(parts)


def _numbers(c: Contents, event: Event) -> str:
    if c.loss is None:
        return ""
    before = c.loss.within(c.first, event.start - 1)
    finite = before[np.isfinite(before)]
    bad = int(np.sum(~np.isfinite(c.loss.values)))
    share = bad / max(1, len(c.loss))
    if not len(finite):
        return f"The loss was never finite, in {words.count(len(c.loss), 'step')}."
    last = words.number(float(np.median(finite[-20:])))
    return (
        f"It stood at {last} in the last finite steps before. The loss is not finite at "
        f"{words.share_of(share)} of the steps."
    )
