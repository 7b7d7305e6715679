"""Attention and output logits."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.figures.figure import (
    Drawn,
    Figure,
    Mark,
    Note,
    largest_of,
    log_text,
    range_of,
    scale,
    unit_text,
    within_window,
)
from dyndiag.reports.figures.layers import heat

LOGITS = 1000.0  # an attention logit known to hurt


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
        worst = max(modules, key=lambda m: range_of(c.series[prefix + m].within(*window))[1])
        modules = (worst,)
    marks: list[Mark] = []
    data: list[Drawn] = []
    order = ("s3", "s4", "s2", "s1")
    values = np.concatenate(
        [within_window(c.series[prefix + module], window) for module in modules]
    )
    y = scale(values, ratio=10.0)
    notes: list[Note] = []
    high = range_of(values)[1]
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
        unit_text("nats, unmasked pairs", log_text(y)), height, tuple(marks), tuple(data), y,
        window=window, notes=tuple(notes),
        says=f"The largest value was {words.number(high)}.",
    )  # fmt: skip


def largest_attention(c: Contents, id: str, height: int) -> Figure | None:
    """The largest attention logit of all blocks, for the timeline."""
    prefix, modules = attention_names(c)
    if not modules:
        return None
    whole = largest_of(f"{prefix}:largest", [c.series[prefix + module] for module in modules])
    y = scale(whole.values, ratio=10.0)
    marks = [Mark("line", whole.name, "largest attention logit", "s4")]
    notes: tuple[Note, ...] = ()
    if range_of(whole.values)[1] > LOGITS / 2:
        marks.insert(0, Mark("rule", y=LOGITS, cls="limit", dash="dot"))
        notes = (Note(float(c.first), "1,000", LOGITS, dx=4, dy=-5),)
    return Figure(
        id, "Largest attention logit", unit_text("all blocks", log_text(y)), height, tuple(marks),
        (Drawn(whole.name, whole),), y, context=True, xaxis=False, notes=notes,
    )  # fmt: skip


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
