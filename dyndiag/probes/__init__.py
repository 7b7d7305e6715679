"""What is measured; one file a family.

`StepWatch` reads the training step itself, always. The probes of `sampled_probes` take passes
of their own, each on its share of the budget. The others are asked for by the user:
`Monitor(..., probes=[…])`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from dyndiag import schedule
from dyndiag.probes.checked_hessian import CheckedHessian
from dyndiag.probes.continual import AfterSwitch, ContinualAccuracy
from dyndiag.probes.curvature import BatchSharpness, Density, Sharpness, Trace
from dyndiag.probes.forward import unwatched
from dyndiag.probes.passing import PassingStep, StepProbe
from dyndiag.probes.predictions import Predictions
from dyndiag.probes.stability import RealisedEdge
from dyndiag.probes.step import Step, StepWatch, learning_rates
from dyndiag.schedule import Budget, FixedInterval, Schedule
from dyndiag.state import Measurements, TrainState


@runtime_checkable
class Probe(Protocol):
    """Measures some series of one area, on its own schedule, inside the guard.

    `applies` says, for nothing, whether there is anything to measure on. `notices`, if there is
    such an attribute, holds sentences for the user, each told once.
    """

    @property
    def name(self) -> str: ...
    @property
    def due(self) -> Schedule: ...
    @property
    def applies(self) -> Callable[[TrainState], bool]: ...
    def measure(self, state: TrainState) -> Measurements: ...


def sampled_probes(share: float) -> tuple[ContinualAccuracy, list[Probe]]:
    """The probes that take passes of their own, with `share` of training time divided up."""
    continual = ContinualAccuracy(AfterSwitch(0.2 * share))
    hessian = CheckedHessian()
    return continual, [
        Predictions(FixedInterval(0.1 * share)),
        RealisedEdge(Budget(0.05 * share, gradients=2)),
        Sharpness(Budget(0.5 * share, gradients=40, advance=0.5 * schedule.GRACE), hessian),
        BatchSharpness(Budget(0.05 * share, gradients=4), hessian),
        Trace(Budget(0.05 * share, gradients=25), hessian),
        Density(Budget(0.05 * share, gradients=250), hessian),
        continual,
    ]


__all__ = [
    "ContinualAccuracy",
    "Measurements",
    "PassingStep",
    "Probe",
    "Step",
    "StepProbe",
    "StepWatch",
    "learning_rates",
    "sampled_probes",
    "unwatched",
]
