"""What a run's series mean: streaming detectors, one file an event kind. None needs torch.

A detector sees each step's values once, in order, and its events depend on nothing else: not on
how often values are flushed, and a replay of the stored values gives the live events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dyndiag.detectors.detector import Detector
from dyndiag.detectors.divergence import Divergence
from dyndiag.detectors.early_overshoot import EarlyOvershoot
from dyndiag.detectors.edge_of_stability import EdgeOfStability
from dyndiag.detectors.loss_spike import LossSpike
from dyndiag.detectors.non_finite import NonFinite
from dyndiag.detectors.policy_entropy import EntropyCollapse, EntropyExplosion
from dyndiag.detectors.probe_failed import ProbeFailed
from dyndiag.detectors.progressive_sharpening import ProgressiveSharpening
from dyndiag.detectors.stability_gap import StabilityGap
from dyndiag.errors import DyndiagError
from dyndiag.values import Event

__all__ = [
    "Detector",
    "Divergence",
    "EarlyOvershoot",
    "EdgeOfStability",
    "EntropyCollapse",
    "EntropyExplosion",
    "LossSpike",
    "NonFinite",
    "ProbeFailed",
    "ProgressiveSharpening",
    "StabilityGap",
    "default_detectors",
    "detectors_from",
    "replay",
]

_KINDS = (
    ProgressiveSharpening,
    EdgeOfStability,
    EarlyOvershoot,
    LossSpike,
    Divergence,
    NonFinite,
    StabilityGap,
    EntropyCollapse,
    EntropyExplosion,
    ProbeFailed,
)


def default_detectors() -> list[Detector]:
    """A fresh detector of every kind, at its default thresholds."""
    return [kind() for kind in _KINDS]


def detectors_from(parameters: Mapping[str, Mapping[str, float]]) -> list[Detector]:
    """Fresh detectors from `{kind: parameters}`, as a run keeps them.

    >>> kept = {detector.kind: detector.parameters for detector in default_detectors()}
    >>> [detector.kind for detector in detectors_from(kept)] == list(kept)
    True
    """
    known: dict[str, Callable[..., Detector]] = {kind.kind: kind for kind in _KINDS}
    detectors: list[Detector] = []
    for kind, thresholds in parameters.items():
        if kind not in known:
            raise DyndiagError(
                f"No detector is called {kind!r}: use one of {', '.join(known)}, "
                "or the version of dyndiag that wrote the run."
            )
        try:
            detectors.append(known[kind](**thresholds))
        except TypeError as error:
            raise DyndiagError(f"The detector {kind!r} was built differently: {error}.") from error
    return detectors


def replay(
    rows: Iterable[tuple[int, Mapping[str, float]]], detectors: Sequence[Detector] | None = None
) -> list[Event]:
    """The final state of every event of these rows, by start and kind.

    The detectors (default: all, fresh) are used up: they remember these rows.
    """
    detectors = default_detectors() if detectors is None else detectors
    events = {
        event.name: event
        for step, values in rows
        for detector in detectors
        for event in detector.update(step, values)
    }
    return sorted(events.values(), key=lambda event: (event.start, event.kind, event.series))
