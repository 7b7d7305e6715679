"""After a switch of tasks an old one is lost for a while, and comes back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, NamedTuple

from dyndiag.detectors.estimates import is_column
from dyndiag.values import Event

_ACCURACY = "continual/accuracy/"
_SAMPLES = "continual/samples/"
_TASK = "continual/task"


@dataclass(eq=False)
class StabilityGap:
    """The accuracy on an old task dips after a switch and recovers (De Lange et al. 2023).

    A switch is where `continual/task` changes; for `window` steps, or until the next switch, each
    task that was trained before is watched. Reference: mean of its last `average` evaluations
    before the switch. An event is a *transient* (what has come back since the trough) above the
    floor max(`least`, se·(√(2 ln window) + `margin`)), with se of the evaluation's
    `continual/samples`: the lowest of many noisy evaluations dips by itself. What never comes back
    is forgetting, and no event. On a constant accuracy of .9 and 300 evaluations it alarms in 1.1 %
    of windows with 100 samples and in .07 % with 1,000.

    Start: the first evaluation as deep as the floor. Peak: the trough. End: the recovery, which is
    the first evaluation from the trough on within `tolerance` of the final level; the event is open
    until the mean of the last evaluations is within the floor of the reference, or the window ends.
    Its figures follow the window to its end. Severity: the depth.

    Tasks are numbered in the order in which their accuracies first appear. Cost: nothing but at
    evaluations; there a pass over the window (at most `window` values) for each old task.
    """

    kind: ClassVar[str] = "stability_gap"

    window: int = 300
    average: int = 5
    least: float = 0.05
    margin: float = 1.5
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        self._task: int | None = None
        self._names: list[str] = []
        self._trained: set[int] = set()
        self._recent: dict[str, deque[float]] = {}
        self._lowest: dict[str, float] = {}
        self._watched: list[_Watch] = []

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        if _TASK not in values:
            return []
        task = int(values[_TASK])
        accuracies = {
            name.removeprefix(_ACCURACY): value
            for name, value in values.items()
            if name.startswith(_ACCURACY) and not is_column(name) and math.isfinite(value)
        }
        self._names += [name for name in accuracies if name not in self._names]
        events = []
        switched = self._task is not None and task != self._task
        if self._watched and (switched or step - self._watched[0].switched >= self.window):
            events += [event for watch in self._watched for event in watch.finish()]
            self._watched = []
        if switched:
            self._watched = [
                self._watch(name, step, values)
                for index, name in enumerate(self._names)
                if index in self._trained and index != task and name in self._recent
            ]
        self._task = task
        self._trained.add(task)
        for name, accuracy in accuracies.items():
            self._remember(name, accuracy)
        for watch in self._watched:
            if watch.task in accuracies:
                events += watch.take(step, accuracies[watch.task], self._lowest[watch.task])
        return events

    def _watch(self, task: str, step: int, values: Mapping[str, float]) -> _Watch:
        reference = sum(self._recent[task]) / len(self._recent[task])
        samples = values.get(_SAMPLES + task, math.nan)
        noise = 0.0
        if samples > 0:
            deviation = math.sqrt(max(reference * (1 - reference), 0.0) / samples)
            noise = deviation * (math.sqrt(2 * math.log(self.window)) + self.margin)
        depth = noise * math.sqrt(1 + 1 / len(self._recent[task]))  # the reference is noisy too
        floor, deep = max(self.least, noise), max(self.least, depth)
        return _Watch(self, task, step, reference, samples, floor, deep)

    def _remember(self, task: str, accuracy: float) -> None:
        self._recent.setdefault(task, deque(maxlen=self.average)).append(accuracy)
        in_training = self._names.index(task) == self._task
        before = math.inf if in_training else self._lowest.get(task, math.inf)
        self._lowest[task] = min(accuracy, before)


class Gap(NamedTuple):
    """Figures of one old task over the evaluations after a switch, as if the last were the end."""

    depth: float
    transient: float
    forgetting: float
    area: float
    """Sum over evaluations of what is missing to the reference."""
    trough: int
    """Index of the lowest evaluation."""
    recovery: int
    """Index of the first one from there on within tolerance of the final level."""


def gap(
    reference: float, accuracies: Sequence[float], *, average: int = 5, tolerance: float = 0.01
) -> Gap:
    """
    >>> figures = gap(0.9, [0.5, 0.7, 0.85], average=1)
    >>> [round(figure, 3) for figure in figures]
    [0.4, 0.35, 0.05, 0.65, 0, 2]
    """
    tail = accuracies[-average:]
    final = sum(tail) / len(tail)
    lowest = min(accuracies)
    trough = accuracies.index(lowest)
    back = (i for i in range(trough, len(accuracies)) if accuracies[i] >= final - tolerance)
    return Gap(
        depth=reference - lowest,
        transient=final - lowest,
        forgetting=reference - final,
        area=sum(max(reference - accuracy, 0.0) for accuracy in accuracies),
        trough=trough,
        recovery=next(back, len(accuracies) - 1),
    )


@dataclass
class _Watch:
    """One old task after one switch."""

    rule: StabilityGap
    task: str
    switched: int
    reference: float
    samples: float
    floor: float
    deep: float
    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    lowest: float = math.inf
    """Since the end of the task's own training, so perhaps of an earlier switch."""
    start: int | None = None
    told: object = None

    def take(self, step: int, accuracy: float, lowest: float) -> list[Event]:
        self.steps.append(step)
        self.accuracies.append(accuracy)
        self.lowest = lowest
        if self.start is None and self.reference - accuracy >= self.deep:
            self.start = step
        return self._tell(ended=False)

    def finish(self) -> list[Event]:
        return self._tell(ended=True)

    def _tell(self, *, ended: bool) -> list[Event]:
        """The event, if there is one and it differs visibly from what was last told."""
        if self.start is None:
            return []
        rule = self.rule
        figures = gap(
            self.reference, self.accuracies, average=rule.average, tolerance=rule.tolerance
        )
        if self.told is None and figures.transient < self.floor:
            return []
        back = ended or figures.forgetting <= self.floor + rule.tolerance
        end = self.steps[figures.recovery] if back else None
        telling = (
            figures.trough,
            end if ended else back,
            round(figures.transient, 2),
            round(figures.forgetting, 2),
        )
        if telling == self.told:
            return []
        self.told = telling
        return [self._event(figures, end)]

    def _event(self, figures: Gap, end: int | None) -> Event:
        details: dict[str, float | str] = {
            "task": self.task,
            "switch": self.switched,
            "threshold": self.floor,
            "value": figures.transient,
            "depth": figures.depth,
            "transient": figures.transient,
            "forgetting": figures.forgetting,
            "reference": self.reference,
            "trough": self.accuracies[figures.trough],
            "min_acc": self.lowest,
            "area": figures.area,
            "evaluations": len(self.accuracies),
            "period": (self.steps[-1] - self.steps[0]) / max(len(self.steps) - 1, 1),
        }
        if end is not None:
            details["recovery_steps"] = self.steps[figures.recovery] - self.switched + 1
        if self.samples > 0:
            details["samples"] = self.samples
        else:
            details["in_doubt"] = "evaluation size unknown"
        sure = figures.transient >= 2 * self.floor and self.samples > 0
        assert self.start is not None
        return Event(
            StabilityGap.kind,
            self.start,
            self.steps[figures.trough],
            end,
            severity=figures.depth,
            confidence=0.95 if sure else 0.8 if self.samples > 0 else 0.6,
            series=(_ACCURACY + self.task,),
            details=details,
        )
