"""The edge ratio rises to 1 and stays there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from dyndiag.detectors.estimates import Sample, sample
from dyndiag.detectors.windows import RunningMedian, median
from dyndiag.values import Event

_RATIO = "stability/edge_ratio"
_BATCH = "curvature/batch_sharpness"
_SMOOTH = 5
_CONSECUTIVE = 3
_WIDER = 0.5 / 0.8
"""Batch sharpness hovers lower: its band begins at .5 where the edge ratio's begins at .8."""


@dataclass(eq=False)
class EdgeOfStability:
    """The edge ratio crosses into a band around 1 and hovers there (Cohen et al. 2021).

    Opens at the third ratio in a row of at least `gate`, with a running median of five in
    [`lower`, `upper`] that is `rise` times the lowest such median since warm-up: a crossing, not a
    coincidence, so a run that sits at .9 from its start opens nothing. Closes where that median
    leaves [`leaves_below`, `leaves_above`]. Provisional ratios enter medians, but the one that
    opens, tops or closes is certified; what is unconverged, NaN or of the warm-up enters nothing.

    With minibatches, where batch sharpness is measured and no preconditioner is in the way, its
    ratio to the threshold is judged instead, in a band that begins lower.

    Severity: steps at the edge so far. Confidence is high for a full batch at least `raised` of
    whose steps raise the loss. With minibatches the edge is a hint; it is undecided (below one
    half) on the edge ratio of another batch, before `enough` samples, and where gradients are
    clipped at more than `clipped` of the steps: clipped descent settles in a cycle at any ratio
    above 1.
    """

    kind: ClassVar[str] = "edge_of_stability"

    gate: float = 0.75
    lower: float = 0.8
    upper: float = 1.3
    rise: float = 1.25
    leaves_below: float = 0.7
    leaves_above: float = 1.5
    enough: int = 10
    raised: float = 0.3
    clipped: float = 0.5

    def __post_init__(self) -> None:
        self._warming_up = False
        self._full_batch: float | None = None
        self._preconditioned = False
        self._threshold = math.nan
        self._loss = math.inf
        self._watch(_RATIO)

    def _watch(self, series: str) -> None:
        self._series = series
        self._wider = _WIDER if series == _BATCH else 1.0
        self._median = RunningMedian(_SMOOTH)
        self._certified: deque[bool] = deque(maxlen=_SMOOTH)
        self._lowest = math.inf
        self._samples = 0
        self._steps = _Steps()
        self._open: _Stay | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        self._count(values)
        ratio = self._ratio(values)
        if ratio is None:
            return []
        self._samples += 1
        self._median.push(ratio.value)
        self._certified.append(ratio.certified)
        if self._median.full:
            self._lowest = min(self._lowest, self._median.value)
        stay = self._open
        if stay is None:
            if not (ratio.certified and self._arrives()):
                self._steps = _Steps()
                return []
            stay = self._open = _Stay(
                self._series,
                step,
                self._median.value,
                self._lowest,
                self._threshold,
                all(self._certified),
                self._steps,
            )
        stay.take(step, ratio)
        at_edge = self.leaves_below * self._wider <= self._median.value <= self.leaves_above
        if ratio.certified and not at_edge:
            stay.end, self._open = step, None
            self._steps = _Steps()
        return [stay.event(self._confidence(stay), self._doubts(stay))]

    def _count(self, values: Mapping[str, float]) -> None:
        loss = values.get("train/loss")
        if loss is None:
            return
        self._steps.taken += 1
        self._steps.raised += loss > self._loss
        self._loss = loss
        clipped = values.get("gradients/norm_clipped")
        if clipped is not None:
            self._steps.clipped += clipped < 0.999 * values.get("gradients/norm", 0.0)

    def _ratio(self, values: Mapping[str, float]) -> Sample | None:
        if _RATIO not in values and _BATCH not in values:  # nearly always
            return None
        self._warming_up = values.get("stability/warmup", self._warming_up) == 1
        self._full_batch = values.get("stability/full_batch", self._full_batch)
        self._preconditioned |= "curvature/preconditioned_sharpness" in values
        self._threshold = values.get("stability/threshold", self._threshold)
        if (
            _BATCH in values
            and self._series != _BATCH
            and self._full_batch == 0
            and self._threshold > 0
            and not self._preconditioned
            and self._open is None
        ):
            self._watch(_BATCH)
        if self._warming_up:
            return None
        ratio = sample(values, self._series)
        if ratio is None or self._series == _RATIO:
            return ratio
        return Sample(ratio.value / self._threshold, ratio.certified)

    def _arrives(self) -> bool:
        if not self._median.full:
            return False
        middle = self._median.value
        lately = list(self._median.values)[-_CONSECUTIVE:]
        return (
            min(lately) >= self.gate * self._wider
            and self.lower * self._wider <= middle <= self.upper
            and middle >= self.rise * self._lowest
        )

    def _doubts(self, stay: _Stay) -> list[str]:
        doubts = []
        if self._full_batch != 1:
            doubts.append("minibatch")
        if stay.steps.share(stay.steps.clipped) > self.clipped:
            doubts.append("clipping")
        if self._samples < self.enough:
            doubts.append("few samples")
        return doubts

    def _confidence(self, stay: _Stay) -> float:
        doubts = self._doubts(stay)
        if "clipping" in doubts or "few samples" in doubts:
            return 0.4
        if "minibatch" in doubts:
            hint = stay.series == _BATCH or self._full_batch is None
            return 0.6 if hint else 0.45
        if stay.steps.share(stay.steps.raised) < self.raised:
            return 0.85
        return 0.95 if stay.all_certified else 0.9


def undecided(ratios: Sequence[float], rule: EdgeOfStability | None = None) -> bool:
    """Whether these, all of a run's judged edge ratios, may mean "at the edge from its start".

    So few samples cannot tell that from a coincidence; from `enough` on, the answer is no event.

    >>> undecided([0.9, 0.95, 1.0, 0.9]), undecided([0.3, 0.5, 0.9, 1.0]), undecided([0.9] * 12)
    (True, False, False)
    """
    rule = rule or EdgeOfStability()
    return (
        _CONSECUTIVE <= len(ratios) < rule.enough
        and min(ratios) >= rule.gate
        and rule.lower <= median(ratios) <= rule.upper
    )


@dataclass
class _Steps:
    """Counts since the last sample before the edge."""

    taken: int = 0
    raised: int = 0
    clipped: int = 0

    def share(self, count: int) -> float:
        return count / self.taken if self.taken else 0.0


@dataclass
class _Stay:
    """A stay at the edge."""

    series: str
    start: int
    median: float
    lowest: float
    threshold: float
    all_certified: bool
    steps: _Steps
    peak: int = 0
    highest: float = -math.inf
    last: int = 0
    value: float = math.nan
    samples: int = 0
    certified: int = 0
    end: int | None = None

    def take(self, step: int, ratio: Sample) -> None:
        self.last, self.value = step, ratio.value
        self.samples += 1
        self.certified += ratio.certified
        if ratio.certified and ratio.value > self.highest:
            self.peak, self.highest = step, ratio.value

    def event(self, confidence: float, doubts: Sequence[str]) -> Event:
        details: dict[str, float | str] = {
            "value": self.value,
            "peak_value": self.highest,
            "median": self.median,
            "median_before": self.lowest,
            "factor": self.median / self.lowest,
            "samples": self.samples,
            "certified": self.certified,
            "steps": self.steps.taken,
            "raised": self.steps.share(self.steps.raised),
            "clipped": self.steps.share(self.steps.clipped),
        }
        if not math.isnan(self.threshold):
            details["threshold"] = self.threshold
        if doubts:
            details["in_doubt"] = ", ".join(doubts)
        return Event(
            EdgeOfStability.kind,
            self.start,
            self.peak,
            self.end,
            severity=float(self.last - self.start),
            confidence=confidence,
            series=(self.series,),
            details=details,
        )
