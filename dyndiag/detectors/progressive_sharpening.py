"""The sharpness keeps rising while the edge is still far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import ClassVar, NamedTuple

import numpy as np

from dyndiag.detectors.estimates import sample
from dyndiag.detectors.windows import RunningMedian, median
from dyndiag.values import Event

_PLAIN = "curvature/sharpness"
_PRECONDITIONED = "curvature/preconditioned_sharpness"
_RATIO = "stability/edge_ratio"


@dataclass(eq=False)
class ProgressiveSharpening:
    """A trend upwards in ln sharpness over the last `window` samples (Cohen et al. 2021).

    Opens where, over at least `least` samples at one learning rate, the Theil-Sen slope is
    positive, the Mann-Kendall test is below 5 % (one-sided), both the fitted rise and that from the
    first three samples to the last three are `rise` times in all, and the median edge ratio is
    below `edge`. Where the rate does not stay, sharpness times
    rate must pass the test and sharpness itself must slope upwards too: in a warm-up the product
    rises by itself. The minimal rise carries the weight, because the rank test fires far too often
    on samples that depend on each other: of 100 flat runs of 100 samples with 5 % of noise it
    alarms in none, in 2 if neighbours correlate by .9; with 10 % in 7 and 70. Preconditioned
    sharpness is judged where it exists; an unknown optimizer, without edge ratio, is judged
    without. Closes where the slope fails `fails` times in a row or the median edge ratio reaches
    `edge`.

    Warm-up, NaN, unconverged and non-positive values enter nothing; provisional ones enter the
    trend, but neither open nor close.

    Start: where the rule first holds; `since` tells where the trend's window begins. Severity:
    highest sharpness / the first ones of that window.

    Cost: at a sample, window² / 2 slopes in numpy; else two look-ups.
    """

    kind: ClassVar[str] = "progressive_sharpening"

    window: int = 32
    least: int = 6
    rise: float = 1.2
    z: float = 1.645
    edge: float = 0.8
    fails: int = 3

    def __post_init__(self) -> None:
        self._rate = 1.0  # unknown: as good as constant
        self._warming_up = False
        self._full_batch: float | None = None
        self._series = _PLAIN
        self._points: deque[_Point] = deque(maxlen=self.window)
        self._ratio = RunningMedian(5)
        self._failed = 0
        self._open: _Rise | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        self._rate = values.get("train/learning_rate", self._rate)
        if _PLAIN not in values and _PRECONDITIONED not in values:  # nearly always
            return []
        self._warming_up = values.get("stability/warmup", self._warming_up) == 1
        self._full_batch = values.get("stability/full_batch", self._full_batch)
        if _PRECONDITIONED in values and self._series == _PLAIN and self._open is None:
            self._series = _PRECONDITIONED
            self._points.clear()
        sharpness = sample(values, self._series)
        if self._warming_up or sharpness is None or sharpness.value <= 0:
            return []
        point = _Point(step, sharpness.value, self._rate, sharpness.certified)
        self._points.append(point)
        ratio = sample(values, _RATIO)
        if ratio is not None:
            self._ratio.push(ratio.value)
        below_edge = not self._ratio.values or self._ratio.value < self.edge
        trend = self._trend()
        rising = trend is not None and trend.slope > 0 and trend.z > self.z
        rise = self._open
        if rise is None:
            if trend is None or not rising or min(trend.rise, trend.grown) < self.rise:
                return []
            if not (below_edge and point.certified):
                return []
            minibatch = self._full_batch == 0
            rise = self._open = _Rise(self._series, step, trend, minibatch, self.rise)
        self._failed = 0 if rising else self._failed + 1
        rise.z = max(rise.z, trend.z if trend else 0.0)
        changed = rise.take(point)
        if point.certified and (not below_edge or self._failed >= self.fails):
            rise.end, self._open = step, None
            self._points.clear()  # the next event needs a rise of its own
            changed = True
        return [rise.event()] if changed else []

    def _trend(self) -> _Trend | None:
        """Of sharpness since the rate last changed, or else of sharpness times rate."""
        points = list(self._points)
        steady = list(takewhile(lambda point: point.rate == self._rate, reversed(points)))[::-1]
        if len(steady) >= self.least:
            return _fit(steady, [math.log(point.value) for point in steady])
        if len(points) < self.least or min(point.rate for point in points) <= 0:
            return None
        trend = _fit(points, [math.log(point.value * point.rate) for point in points])
        alone = _fit(points, [math.log(point.value) for point in points])
        return trend if alone.slope > 0 else alone


class _Point(NamedTuple):
    step: int
    value: float
    rate: float
    certified: bool


class _Trend(NamedTuple):
    points: Sequence[_Point]
    slope: float
    """Theil-Sen, of the logarithm, per step."""
    z: float
    """Mann-Kendall, with continuity correction."""

    @property
    def rise(self) -> float:
        return math.exp(self.slope * (self.points[-1].step - self.points[0].step))

    @property
    def first(self) -> float:
        return median(point.value for point in self.points[:3])

    @property
    def grown(self) -> float:
        """What the slope of a series that fell and came up again does not tell."""
        return median(point.value for point in self.points[-3:]) / self.first


def _fit(points: Sequence[_Point], logarithms: Sequence[float]) -> _Trend:
    n = len(points)
    steps, values = np.array([point.step for point in points]), np.array(logarithms)
    early, late = np.triu_indices(n, 1)
    differences = values[late] - values[early]
    slope = float(np.median(differences / (steps[late] - steps[early])))
    ups = float(np.sign(differences).sum())
    z = (ups - math.copysign(min(1.0, abs(ups)), ups)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return _Trend(points, slope, z)


class _Rise:
    """A rise of the sharpness, an event in the making."""

    def __init__(
        self, series: str, start: int, trend: _Trend, minibatch: bool, threshold: float
    ) -> None:
        self.series = series
        self.start = start
        self.since = trend.points[0].step
        self.value = trend.rise
        self.z = trend.z
        self.minibatch = minibatch
        self.threshold = threshold
        self.first = trend.first
        self.samples = len(trend.points) - 1
        self.certified = sum(point.certified for point in trend.points) - 1
        self.peak, self.highest = start, -math.inf
        self.end: int | None = None

    def take(self, point: _Point) -> bool:
        """Whether this is a new peak."""
        self.samples += 1
        self.certified += point.certified
        if not point.certified or point.value <= self.highest:
            return False
        self.peak, self.highest = point.step, point.value
        return True

    @property
    def confidence(self) -> float:
        if self.minibatch:
            return 0.8
        sure = self.certified == self.samples and self.z > 3
        return 0.95 if sure else 0.85

    def event(self) -> Event:
        factor = self.highest / self.first
        details: dict[str, float | str] = {
            "threshold": self.threshold,
            "value": self.value,
            "factor": factor,
            "median_before": self.first,
            "peak_value": self.highest,
            "since": self.since,
            "samples": self.samples,
            "certified": self.certified,
            "z": self.z,
        }
        if self.minibatch:
            details["in_doubt"] = "minibatch"
        return Event(
            ProgressiveSharpening.kind,
            self.start,
            self.peak,
            self.end,
            severity=factor,
            confidence=self.confidence,
            series=(self.series,),
            details=details,
        )
