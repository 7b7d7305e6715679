"""What happened to earlier tasks after a switch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dyndiag.continual.tasks import Floats, Steps
from dyndiag.detectors.stability_gap import gap

WINDOW = 300
"""Steps after a switch in which a gap is looked for."""


@dataclass(frozen=True)
class Gap:
    """What one task went through after the switch to a later one. Accuracies in 0…1."""

    switched_to: str
    switch: int
    """The first step on the later task."""
    reference: float
    """Mean of the last evaluations before the switch."""
    trough: float
    trough_step: int
    """The lowest evaluation in the steps after the switch (300, or as long as the task took)."""
    end: float
    """Mean of the last evaluations in these steps."""
    area: float
    """Sum over evaluations of what is missing to the reference."""
    recovery_step: int
    """The first evaluation from the trough on within a point of the end."""
    noise_floor: float
    """How deep a constant accuracy seems to dip by chance (about once in a hundred windows):
    se · (√(2 ln W) + 1.5), se = √(A (1 − A) / n) of n samples at the reference A, W the number of
    steps. NaN where n is not known."""
    period: float
    """Median number of steps between evaluations."""

    @property
    def depth(self) -> float:
        return self.reference - self.trough

    @property
    def transient(self) -> float:
        """The part of the depth that came back: a stability gap, if it is above `noise_floor`."""
        return self.end - self.trough

    @property
    def forgetting(self) -> float:
        return self.reference - self.end

    @property
    def recovery_steps(self) -> int:
        """Steps from the switch to the recovery, that of the switch counted."""
        return self.recovery_step - self.switch + 1


def gaps_of(
    steps: Steps,
    values: Floats,
    later: Sequence[tuple[str, int, int]],
    samples: float,
    average: int,
) -> Iterable[Gap]:
    for other, switch, end in later:
        before = values[steps < switch]
        long = min(WINDOW, end - switch + 1)
        inside = (steps >= switch) & (steps < switch + long)
        if not len(before) or not np.any(inside):
            continue
        after, at = values[inside], steps[inside]
        reference = level(before, average)
        found = gap(reference, after.tolist(), average=average)
        yield Gap(
            switched_to=other,
            switch=switch,
            reference=reference,
            trough=float(after[found.trough]),
            trough_step=int(at[found.trough]),
            end=level(after, average),
            area=found.area,
            recovery_step=int(at[found.recovery]),
            noise_floor=noise_floor(reference, samples, long),
            period=period(at),
        )


def noise_floor(reference: float, samples: float, steps: int) -> float:
    """How deep the lowest of `steps` evaluations of a constant accuracy may lie by chance.

    >>> round(noise_floor(0.9, 1000, 300), 4)
    0.0463
    """
    if not samples > 0:
        return math.nan
    error = math.sqrt(max(reference * (1 - reference), 0.0) / samples)
    return error * (math.sqrt(2 * math.log(max(steps, 1))) + 1.5)


def level(values: Floats, average: int) -> float:
    """Mean of the last `average` evaluations."""
    return float(np.mean(values[-average:])) if len(values) else math.nan


def period(steps: Steps) -> float:
    """Median number of steps from one evaluation to the next."""
    return float(np.median(np.diff(steps))) if len(steps) > 1 else math.nan
