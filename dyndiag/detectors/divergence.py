"""The loss leaves for good: non-finite, above where it started, or back on its first plateau."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from dyndiag.detectors.windows import RunningMedian, median
from dyndiag.values import Event

_FIRST = 16
"""So many losses tell where the run starts and how noisy it is."""
_SMOOTH = 5


@dataclass(eq=False)
class Divergence:
    """The median of five losses stays high for `steps` steps and at least `points` losses.

    High is: above the first loss by more than `noise` standard deviations of its neighbours; and,
    once the loss has fallen by `learned` of its first value (and clear of the noise), also on the
    first plateau, which is within `plateau` of that fall below the first loss: a network that has
    collapsed sits at chance, a little below where it started. A non-finite loss counts as
    infinitely high, and a median that is not finite opens the event at once. It closes where the
    median is clearly below again (twice the margin), and where a new task begins, whose own first
    losses are then what counts.

    Start: where the median first was high. Severity: highest finite median over the first loss
    (their difference where that is not positive).
    """

    kind: ClassVar[str] = "divergence"

    steps: int = 50
    points: int = 10
    noise: float = 3.0
    learned: float = 0.1
    plateau: float = 0.1

    def __post_init__(self) -> None:
        self._task = math.nan
        self._begin()

    def _begin(self) -> None:
        self._smooth = RunningMedian(_SMOOTH)
        self._begun: list[tuple[int, float, float]] = []
        self._first = math.inf
        self._noise = 0.0
        self._lowest = math.inf
        self._high: _Stretch | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        task = values.get("continual/task", self._task)
        ended = self._switch(step) if task > self._task else []
        self._task = task
        loss = values.get("train/loss")
        return ended if loss is None else [*ended, *self._take(step, loss)]

    def _switch(self, step: int) -> list[Event]:
        high = self._high
        self._begin()
        if high is None or not high.reported:
            return []
        high.end = step
        return [high.event()]

    def _take(self, step: int, loss: float) -> list[Event]:
        self._smooth.push(loss if math.isfinite(loss) else math.inf)
        if len(self._begun) == _FIRST:
            return self._judge(step, self._smooth.value)
        self._begun.append((step, loss, self._smooth.value))
        if len(self._begun) < _FIRST:
            return []
        finite = [loss for _, loss, _ in self._begun if math.isfinite(loss)]
        if finite:
            self._first = finite[0]
            self._noise = self.noise * _noise(finite)
        return [event for step, _, loss in self._begun for event in self._judge(step, loss)]

    def _judge(self, step: int, loss: float) -> list[Event]:
        self._lowest = min(self._lowest, loss)
        fall = self._first - self._lowest
        if fall > max(2 * self._noise, self.learned * abs(self._first)):
            opens, closes = self._first - self.plateau * fall, self._first - 2 * self.plateau * fall
        else:
            opens, closes = self._first + self._noise, self._first
        if self._high is None:
            if loss <= opens and math.isfinite(loss):
                return []
            self._high = _Stretch(step, self._first, opens)
        high = self._high
        if loss < (closes if high.reported else opens):
            high.end, self._high = step, None
            return [high.event()] if high.reported else []
        changed = high.take(step, loss)
        lasting = step - high.start >= self.steps and high.points >= self.points
        if not high.reported and (lasting or math.isinf(loss)):
            high.reported = changed = True
        return [high.event()] if high.reported and changed else []


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of a loss about the mean of its two neighbours: blind to any trend."""
    bends = [
        abs(here - (before + after) / 2)
        for before, here, after in zip(losses, losses[1:], losses[2:], strict=False)
    ]
    return 1.4826 * median(bends) / math.sqrt(1.5) if bends else 0.0


@dataclass
class _Stretch:
    """A time at which the loss is high; an event once it has lasted."""

    start: int
    first: float
    threshold: float
    points: int = 0
    peak: int = 0
    highest: float = -math.inf
    non_finite_at: int | None = None
    reported: bool = False
    end: int | None = None

    def take(self, step: int, loss: float) -> bool:
        """Whether this is a new peak."""
        self.points += 1
        if self.non_finite_at is not None or loss <= self.highest:
            return False
        self.peak = step
        if math.isinf(loss):
            self.non_finite_at = step
        else:
            self.highest = loss
        return True

    def event(self) -> Event:
        details: dict[str, float | str] = {"points": self.points}
        for name, value in (
            ("first_loss", self.first),
            ("threshold", self.threshold),
            ("peak_value", self.highest),
        ):
            if math.isfinite(value):
                details[name] = value
        if self.non_finite_at is not None:
            details["non_finite_at"] = self.non_finite_at
        first = self.first if math.isfinite(self.first) else 1.0
        highest = self.highest if math.isfinite(self.highest) else first
        severity = highest / first if first > 0 else highest - first
        return Event(
            Divergence.kind,
            self.start,
            self.peak,
            self.end,
            severity=min(severity, sys.float_info.max),
            confidence=0.95,
            series=("train/loss",),
            details=details,
        )
