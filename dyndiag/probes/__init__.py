"""What is measured; one file a family.

`StepWatch` reads the training step itself, always. The probes of `sampled_probes` take passes
of their own, each on its share of the budget.
"""

from __future__ import annotations

from typing import Protocol

from dyndiag.probes.continual import AfterSwitch, ContinualAccuracy
from dyndiag.probes.curvature import BatchSharpness, Density, Sharpness, Trace
from dyndiag.probes.predictions import Predictions
from dyndiag.probes.stability import RealisedEdge
from dyndiag.probes.step import Step, StepWatch
from dyndiag.schedule import Budget, FixedInterval, Schedule
from dyndiag.state import Measurements, TrainState

GRACE = 2.0
"""Seconds of passes that every run may take, whatever their share: toy runs are seen whole."""


class Probe(Protocol):
    """Measures some series of one area, on its own schedule, inside the guard.

    `needs_loss`: only where the loss of a batch can be computed. `notices`, if there is one,
    holds sentences for the user, each told once.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_loss(self) -> bool: ...
    @property
    def due(self) -> Schedule: ...
    def measure(self, state: TrainState) -> Measurements: ...


def sampled_probes(share: float) -> tuple[ContinualAccuracy, list[Probe]]:
    """The probes that take passes of their own, with `share` of training time divided up."""

    def part(of: float) -> tuple[float, float]:
        return (of * share, of * GRACE)

    continual = ContinualAccuracy(AfterSwitch(*part(0.2)))
    return continual, [
        Predictions(FixedInterval(*part(0.1))),
        RealisedEdge(Budget(*part(0.05))),
        Sharpness(Budget(*part(0.4))),
        BatchSharpness(Budget(*part(0.1))),
        Trace(Budget(*part(0.075))),
        Density(Budget(*part(0.075), per_e_fold=1)),
        continual,
    ]


__all__ = [
    "ContinualAccuracy",
    "Measurements",
    "Probe",
    "Step",
    "StepWatch",
    "sampled_probes",
]
