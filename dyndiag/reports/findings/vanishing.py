"""Modules that the gradient hardly reaches any more."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.finding import module as named

LAST = 20  # so many of a module's last gradient norms are looked at
FAINT = 1e-6  # of the largest module's: for a first layer a gradient that vanishes on the way
SHOWN = 3


def vanishing(c: Contents) -> str:
    """One sentence about modules whose gradient is zero at the run's end, or a millionth of the
    largest module's; empty if there are none, or if no gradient is left to compare with."""
    prefix = "gradients/norm/"
    last: dict[str, float] = {}
    for module in c.parts.get(prefix, ()):
        values = c.series[prefix + module].values[-LAST:]
        if len(values) and np.isfinite(values).all():
            last[module] = float(np.median(values))
    most = max(last.values(), default=0.0)
    if not most > 0:
        return ""
    largest = max(last, key=lambda module: last[module])
    none = [module for module, norm in last.items() if norm == 0]
    if none:
        return f"No gradient reached {_named(none)} at the end: nothing is learned there."
    faint = min(last, key=lambda module: last[module])
    if last[faint] >= FAINT * most:
        return ""
    share = words.number(last[faint] / most, 2)
    return (
        f"At the end the gradient norm of {named(faint)} was {share} of that of {named(largest)}: "
        "gradients vanish on the way."
    )


def _named(modules: list[str]) -> str:
    shown = [named(module) for module in modules[:SHOWN]]
    more = len(modules) - SHOWN
    return words.listing([*shown, words.count(more, "more module")] if more > 0 else shown)
