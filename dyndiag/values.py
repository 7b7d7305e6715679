"""Estimate and Event: the two things that travel through dyndiag. Neither needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A measured value with what is known about its error, and what it cost.

    >>> Estimate(4.0, error=0.01, products=15, converged=True).columns("curvature/sharpness")
    {'curvature/sharpness': 4.0, 'curvature/sharpness.error': 0.01, \
'curvature/sharpness.products': 15.0, 'curvature/sharpness.converged': 1.0, \
'curvature/sharpness.provisional': 0.0}
    """

    value: float
    error: float = math.nan
    """Residual bound of an eigenvalue, standard error of a mean; in the value's unit."""
    products: int = 0
    """Matrix-vector products (or forward passes, where the probe says so) spent on it."""
    converged: bool = True
    provisional: bool = False
    """Rests on a warm start's residual alone: a larger eigenvalue may have been missed."""
    lower_bound: float | None = None
    upper_bound: float | None = None

    def columns(self, name: str) -> dict[str, float]:
        """The estimate as scalar series: `name` and `name.error`, `.products`, …"""
        columns = {
            name: float(self.value),
            f"{name}.error": float(self.error),
            f"{name}.products": float(self.products),
            f"{name}.converged": float(self.converged),
            f"{name}.provisional": float(self.provisional),
        }
        if self.lower_bound is not None:
            columns[f"{name}.lower_bound"] = float(self.lower_bound)
        if self.upper_bound is not None:
            columns[f"{name}.upper_bound"] = float(self.upper_bound)
        return columns


@dataclass(frozen=True)
class Event:
    """Something that happened over an interval of steps. Frozen: what changes is a new one.

    `(kind, start, series)` names an event; a later Event of the same name replaces the earlier.
    """

    kind: str
    start: int
    """The step at which the opening rule first held."""
    peak: int
    end: int | None = None
    """None while the event is open."""
    severity: float = 0.0
    """How much, in the unit that the detector states (a ratio, a depth, …)."""
    confidence: float = 1.0
    """0…1."""
    series: tuple[str, ...] = ()
    """The series it rests on, the deciding one first."""
    details: Mapping[str, float | str] = field(default_factory=dict)
    """Threshold, value, counts, the assumptions in doubt: numbers and short words by name."""

    @property
    def name(self) -> tuple[str, int, tuple[str, ...]]:
        return (self.kind, self.start, self.series)
