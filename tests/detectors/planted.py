"""Series with planted truth, and how well events find it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dyndiag.values import Event

Row = tuple[int, dict[str, float]]


def rows_of(name: str, values: Iterable[float], *, every: int = 1, **constant: float) -> list[Row]:
    """One row a value; `constant` gives further series, with `__` for the slash."""
    others = {key.replace("__", "/"): value for key, value in constant.items()}
    return [(every * k, {name: float(value), **others}) for k, value in enumerate(values)]


def losses(values: Iterable[float], *, every: int = 1) -> list[Row]:
    return rows_of("train/loss", values, every=every)


def decaying(steps: int = 4000, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """From 5 to 2."""
    time = np.arange(steps)
    rng = np.random.default_rng(seed)
    return 2 + 3 * np.exp(-time / 600) + noise * rng.normal(size=steps)


@dataclass(frozen=True)
class Score:
    """Events against planted starts."""

    delays: tuple[int, ...]
    """Event start - planted start, for those that were found."""
    planted: int
    false_alarms: int

    @property
    def recall(self) -> float:
        """NaN without anything planted. Says nothing about how late it was found."""
        return len(self.delays) / self.planted if self.planted else math.nan

    @property
    def precision(self) -> float:
        """NaN without events."""
        events = len(self.delays) + self.false_alarms
        return len(self.delays) / events if events else math.nan


def score(events: Sequence[Event], planted: Sequence[int], within: int = 2) -> Score:
    """Each planted start is found by at most one event; every other event is a false alarm."""
    free = [event.start for event in events]
    delays = []
    for start in planted:
        delay = min((found - start for found in free), key=abs, default=None)
        if delay is not None and abs(delay) <= within:
            free.remove(start + delay)
            delays.append(delay)
    return Score(tuple(delays), len(planted), len(free))
