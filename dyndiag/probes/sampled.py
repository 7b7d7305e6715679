"""The probes that take passes of their own: what they are, and those that every run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from dyndiag import schedule
from dyndiag.probes.continual.accuracy import AfterSwitch, ContinualAccuracy
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.density import Density
from dyndiag.probes.curvature.minibatch import BatchSharpness, Trace
from dyndiag.probes.curvature.realised_edge import RealisedEdge
from dyndiag.probes.curvature.sharpness import Sharpness
from dyndiag.probes.predictions.predictions import Predictions
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
    """The default ones, with `share` of training time divided up among them."""
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
