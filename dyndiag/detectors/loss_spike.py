"""The loss jumps out of its recent range."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import dropwhile, islice
from typing import ClassVar, NamedTuple

from dyndiag.detectors.windows import RunningMedian, median
from dyndiag.values import Event

_SIGMA = 1.4826
"""Times a median absolute deviation: the standard deviation of a Gaussian."""
_HABIT = 4
"""A rise is a habit if the fourth largest of the remembered ones was nearly as high."""
_RESOLUTION = 3.0
"""Logs round: a rise of fewer than three of the smallest steps ever seen may be rounding."""
_BAND = 20
"""So many calm points tell how far the loss strays by itself."""
_RETURN = 5
"""The loss is back where the median of so many points is back."""


@dataclass(eq=False)
class LossSpike:
    """A loss that rises clear of its last values, whether or not it comes back.

    The level is the median of the last `level` calm losses; a residual is loss / level - 1 (loss -
    level once a loss ≤ 0 has been seen); the scale is 1.4826 MAD of the last `residuals` of them.
    A loss is flagged if its residual exceeds `scales` scales and it stands `rise` times above the
    level, unless it often does (habit) or rounding explains it (resolution). Residuals of one step
    over a short level carry the rule: over a long window a loss that falls by decades hides its
    spikes.

    Flagged losses never enter the level. While a spike is open, a second memory learns from the
    points after its top; once that holds `relearn` of them, a loss which it flags ends this spike
    and begins another. A lone flagged point, back at the next, is an outlier (a hard batch) and no
    event, unless it stands `far` times the `scales` above the level, or at `lone` levels in a log
    of `sparse` steps between points; below `lone` levels its confidence stays under one half.
    Nothing starts within `quiet` rows of a learning rate that rose `jump` times at once.

    Severity: peak / level before. `end`: the first point after the peak in the band where the
    median of five is too; the band is `band` times the level, or the largest deviation of the last
    20 calm points. `steps_to_recover`: from the start until a median of five is at the lowest level
    before the spike; absent until then.

    Cost: a few microseconds a step; two sorts of `residuals` numbers where loss > rise · level.
    """

    kind: ClassVar[str] = "loss_spike"

    level: int = 24
    residuals: int = 128
    ready: int = 16
    scales: float = 6.0
    rise: float = 1.25
    relearn: int = 32
    band: float = 0.1
    lone: float = 1.5
    far: float = 3.0
    sparse: int = 20
    quiet: int = 20
    jump: float = 1.5

    def __post_init__(self) -> None:
        self._calm = _Memory(self)
        self._aftermath = _Memory(self)
        self._candidate: _Spike | None = None
        self._open: _Spike | None = None
        self._unrecovered: deque[_Spike] = deque()
        self._last: deque[tuple[int, float]] = deque(maxlen=_RETURN)
        self._smallest_step = 0.0
        self._best = math.inf
        self._rate = math.inf
        self._rows_to_ignore = 0
        self._task: float | None = None
        self._rows_in_task = math.inf

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        self._notice_causes(values)
        loss = values.get("train/loss")
        if loss is None or not math.isfinite(loss):
            return []
        if loss <= 0 and self._calm.relative:
            self._calm.forget_ratios()
            self._aftermath.forget_ratios()
        last_step, last_loss = self._last[-1] if self._last else (step, loss)
        self._last.append((step, loss))
        if self._open is None:
            changed = self._outside(step, loss, interval=step - last_step)
        else:
            changed = self._inside(self._open, step, loss, last_step)
        if self._unrecovered:
            changed += self._recovered()
        if loss != last_loss:
            difference = abs(loss - last_loss)
            self._smallest_step = min(self._smallest_step or difference, difference)
        return [spike.event() for spike in changed]

    def _notice_causes(self, values: Mapping[str, float]) -> None:
        self._rows_to_ignore -= 1
        self._rows_in_task += 1
        rate = values.get("train/learning_rate", self._rate)
        if rate > self.jump * self._rate:
            self._rows_to_ignore = self.quiet
        self._rate = rate
        task = values.get("continual/task", self._task)
        if self._task is not None and task != self._task:
            self._rows_in_task = 0
        self._task = task

    def _outside(self, step: int, loss: float, interval: int) -> list[_Spike]:
        candidate, self._candidate = self._candidate, None
        if candidate is not None and loss > candidate.top:
            self._begin(candidate)
            return self._inside(candidate, step, loss, step) or [candidate]
        flag = self._flag(self._calm, loss)
        if flag is None:
            self._learn(loss)
            return []
        spike = self._spike(step, loss, flag)
        far = flag.deviations >= self.far * self.scales
        if far or (spike.factor >= self.lone and interval >= self.sparse):
            self._begin(spike)
            return [spike]
        self._candidate = spike
        return []

    def _inside(self, spike: _Spike, step: int, loss: float, last_step: int) -> list[_Spike]:
        if self._aftermath.learned >= self.relearn:
            flag = self._flag(self._aftermath, loss)
            if flag is not None:  # a spike after one that never came back
                spike.end = last_step
                self._calm = self._aftermath
                another = self._spike(step, loss, flag)
                self._begin(another)
                return [spike, another]
        lone = spike.points_out == 1
        spike.points_out += loss > spike.top
        if loss > spike.peak_value:
            spike.peak, spike.peak_value = step, loss
            self._aftermath = _Memory(self, relative=self._calm.relative)
            return [spike]
        self._aftermath.learn(loss)
        after_peak = self._aftermath.learned >= _RETURN
        if after_peak and median(value for _, value in self._last) <= spike.top:
            back = list(dropwhile(lambda point: point[1] > spike.top, self._last))
            spike.end, self._open = back[0][0], None
            for _, value in back:  # flagged or not, lest the next spike opens on them
                self._learn(value)
            return [spike]
        return [spike] if lone and spike.points_out > 1 else []

    def _recovered(self) -> list[_Spike]:
        """Earlier spikes have the higher best, so they recover first."""
        recovered = []
        since = self._last[0][0]
        loss = median(value for _, value in self._last)
        while self._unrecovered:
            spike = self._unrecovered[0]
            if loss > spike.best or since <= spike.peak:
                break
            spike.steps_to_recover = since - spike.start
            recovered.append(self._unrecovered.popleft())
        return recovered

    def _flag(self, memory: _Memory, loss: float) -> _Flag | None:
        return None if self._rows_to_ignore > 0 else memory.flag(loss, self._smallest_step)

    def _spike(self, step: int, loss: float, flag: _Flag) -> _Spike:
        self._calm.residuals.append(flag.residual)
        doubt = "task switch" if self._rows_in_task < self.quiet else ""
        top = flag.level + self._calm.band(flag.level)
        return _Spike(self.lone, step, loss, step, loss, flag, top, self._best, doubt)

    def _begin(self, spike: _Spike) -> None:
        self._open = spike
        self._unrecovered.append(spike)
        self._aftermath = _Memory(self, relative=self._calm.relative)

    def _learn(self, loss: float) -> None:
        self._calm.learn(loss)
        if self._calm.learned >= self.ready:
            self._best = min(self._best, self._calm.losses.value)


class _Flag(NamedTuple):
    level: float
    threshold: float
    """The least loss that would have been flagged."""
    residual: float
    deviations: float
    """The residual in scales."""


class _Memory:
    """What losses have lately been like: their level, and how one step strays from it."""

    def __init__(self, rule: LossSpike, *, relative: bool = True) -> None:
        self._rule = rule
        self.relative = relative
        self.losses = RunningMedian(rule.level)
        self.residuals: deque[float] = deque(maxlen=rule.residuals)
        self.learned = 0

    def learn(self, loss: float) -> None:
        if self.learned:
            self.residuals.append(self._residual(loss, self.losses.value))
        self.losses.push(loss)
        self.learned += 1

    def forget_ratios(self) -> None:
        """Ratios of losses mean nothing from here on; differences start anew."""
        self.relative = False
        self.residuals.clear()

    def band(self, level: float) -> float:
        recent = islice(reversed(self.losses.values), _BAND)
        return max(self._rule.band * abs(level), max(abs(loss - level) for loss in recent))

    def flag(self, loss: float, smallest_step: float) -> _Flag | None:
        rule = self._rule
        if len(self.residuals) < rule.ready:
            return None
        level = self.losses.value
        threshold = level + (rule.rise - 1) * abs(level)
        if loss <= threshold:  # nearly always, and before anything is sorted
            return None
        ordered = sorted(self.residuals)
        middle = median(ordered)
        scale = _SIGMA * median(abs(residual - middle) for residual in ordered)
        lift = max(rule.scales * scale, rule.rise * ordered[-_HABIT])
        lift = max(lift * (level if self.relative else 1.0), _RESOLUTION * smallest_step)
        threshold = max(threshold, level + lift)
        if loss <= threshold:
            return None
        residual = self._residual(loss, level)
        return _Flag(level, threshold, residual, residual / scale if scale else math.inf)

    def _residual(self, loss: float, level: float) -> float:
        return loss / level - 1 if self.relative else loss - level


@dataclass
class _Spike:
    """An event in the making."""

    lone: float
    start: int
    value: float
    peak: int
    peak_value: float
    flag: _Flag
    top: float
    """Upper edge of the band before."""
    best: float
    """Lowest level before."""
    doubt: str
    points_out: int = 1
    end: int | None = None
    steps_to_recover: int | None = None

    @property
    def factor(self) -> float:
        """Peak / level; for a level ≤ 0 the same measure of the rise in units of its size."""
        factor = 1 + (self.peak_value - self.flag.level) / (abs(self.flag.level) or 1.0)
        return min(factor, sys.float_info.max)

    @property
    def confidence(self) -> float:
        high = self.factor >= self.lone
        if self.points_out == 1 and not high:
            return 0.4  # one hard batch looks the same
        return 0.95 if high else 0.85

    def event(self) -> Event:
        details: dict[str, float | str] = {
            "threshold": self.flag.threshold,
            "value": self.value,
            "peak_value": self.peak_value,
            "median_before": self.flag.level,
            "best_before": self.best,
            "factor": self.factor,
            "points": self.points_out,
        }
        if math.isfinite(self.flag.deviations):
            details["deviations"] = self.flag.deviations
        if self.steps_to_recover is not None:
            details["steps_to_recover"] = self.steps_to_recover
        if self.doubt:
            details["in_doubt"] = self.doubt
        return Event(
            LossSpike.kind,
            self.start,
            self.peak,
            self.end,
            severity=self.factor,
            confidence=self.confidence,
            series=("train/loss",),
            details=details,
        )
