"""What the curvature probes share."""

from __future__ import annotations

from dataclasses import replace

from dyndiag.state import TrainState
from dyndiag.values import Estimate


def can_measure_loss(state: TrainState) -> bool:
    """Whether there is a loss of the probe batch, and a parameter to differentiate it by."""
    return bool(state.parameters) and state.loss_fn is not None and state.probe is not None


def mapped(estimate: Estimate, slope: float, offset: float) -> Estimate:
    """slope · estimate + offset, with its error and upper bound; slope ≥ 0."""
    upper = estimate.upper_bound
    return replace(
        estimate,
        value=slope * estimate.value + offset,
        error=slope * estimate.error,
        upper_bound=None if upper is None else slope * upper + offset,
    )
