"""In warm-up a step raises the loss of its own batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from dyndiag.values import Event

_SERIES = "stability/realised_edge"


@dataclass(eq=False)
class EarlyOvershoot:
    """The realised edge ζ exceeds `threshold` in warm-up: the rate's own warm-up is too short.

    ζ > 1 says that the step raised the loss on the very batch it was taken for. The edge ratio
    cannot say so this early, when its frozen preconditioner averages a handful of gradients. Opens
    at the first such step, closes where ζ is back or the warm-up is over. A NaN (a step that did
    not point downhill) says nothing. Severity: the largest ζ.
    """

    kind: ClassVar[str] = "early_overshoot"

    threshold: float = 1.0

    def __post_init__(self) -> None:
        self._warming_up = True
        self._open: Event | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        self._warming_up = values.get("stability/warmup", self._warming_up) == 1
        ratio = values.get(_SERIES, math.nan)
        event = self._open
        if event is None:
            if not (self._warming_up and ratio > self.threshold):
                return []
            self._open = Event(
                self.kind,
                step,
                step,
                severity=ratio,
                confidence=0.95,
                series=(_SERIES,),
                details={"threshold": self.threshold, "value": ratio, "peak_value": ratio},
            )
            return [self._open]
        if not self._warming_up or ratio <= self.threshold:
            self._open = None
            return [replace(event, end=step)]
        if not ratio > event.severity:
            return []
        details = {**event.details, "peak_value": ratio}
        self._open = replace(event, peak=step, severity=ratio, details=details)
        return [self._open]
