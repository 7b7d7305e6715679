"""When a probe is due. Schedules see steps and seconds, never values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    def due(self, step: int, training_seconds: float) -> bool:
        """Whether to measure at this step; `training_seconds` excludes what probes took."""
        ...

    def paid(self, step: int, seconds: float) -> None:
        """A measurement was taken at `step` and cost `seconds`."""
        ...


@dataclass(frozen=True)
class Every:
    """Every n-th step, from step 0; every step before `dense_until`.

    >>> [step for step in range(30) if Every(11).due(step, 0.0)]
    [0, 11, 22]
    """

    n: int
    dense_until: int = 0

    def due(self, step: int, training_seconds: float) -> bool:
        return step % self.n == 0 or step < self.dense_until

    def paid(self, step: int, seconds: float) -> None:
        pass


@dataclass
class LogSpaced:
    """At steps whose distance grows with the step: about `per_e_fold` samples per factor e.

    Distances are odd, so that the period-2 oscillation at the edge of stability is not hidden.
    """

    per_e_fold: int = 32
    _last: int | None = None

    def due(self, step: int, training_seconds: float) -> bool:
        if self._last is None:
            return True
        distance = step - self._last
        return distance % 2 == 1 and distance >= step // self.per_e_fold

    def paid(self, step: int, seconds: float) -> None:
        self._last = step


@dataclass
class Grace:
    """Seconds that all probes of a run together may take whatever their shares."""

    seconds: float
    spent: float = 0.0

    def covers(self, cost: float) -> bool:
        return self.spent + cost <= self.seconds


class Budget:
    """As often as a share of training time allows, at odd intervals.

    The share accrues with training time, and a sample is taken once it pays for it. Before that,
    out of a grace common to all probes, come log-spaced samples, so that toy runs are seen whole;
    they count against the share, which then first has to make up for them. So what probes have
    taken stays below the grace or their shares of training time, whichever is more, but for errors
    in foreseeing a sample's cost: that of the last one, and of the first `gradients` times the
    quickest step. A pause leads to no burst: at most four samples' worth is kept.
    """

    def __init__(
        self, share: float, grace: Grace, gradients: float = 0.0, per_e_fold: int = 32
    ) -> None:
        self._share, self._grace, self._gradients = share, grace, gradients
        self._spaced = LogSpaced(per_e_fold)
        self._last: int | None = None
        self._quickest = float("inf")
        self._cost = self._saved = self._seen = 0.0

    def due(self, step: int, training_seconds: float) -> bool:
        seconds, self._seen = training_seconds - self._seen, training_seconds
        self._quickest = min(self._quickest, seconds)
        self._saved += self._share * seconds
        if self._last is None:
            self._cost = self._gradients * self._quickest
        else:
            self._saved = min(self._saved, 4 * self._cost)
            if (step - self._last) % 2 == 0:
                return False
        if self._saved >= self._cost:
            return True
        return self._grace.covers(self._cost) and self._spaced.due(step, training_seconds)

    def paid(self, step: int, seconds: float) -> None:
        self._last, self._cost = step, seconds
        self._saved -= seconds
        self._grace.spent += seconds
        self._spaced.paid(step, seconds)


class FixedInterval:
    """At one fixed odd interval, for what must be compared over equal intervals.

    (A divergence over a smooth drift grows with the square of its interval.) Where the next
    sample would overspend both the share of training time and the grace, the interval is made
    three times longer; it never becomes shorter.
    """

    def __init__(self, share: float, grace: Grace, interval: int = 11) -> None:
        self._share, self._grace = share, grace
        self.interval = interval
        self._last: int | None = None
        self._cost = self._spent = 0.0

    def due(self, step: int, training_seconds: float) -> bool:
        if self._last is None:
            return True
        if step - self._last < self.interval:
            return False
        share_pays = self._spent + self._cost <= self._share * training_seconds
        if share_pays or self._grace.covers(self._cost):
            return True
        self.interval *= 3
        return False

    def paid(self, step: int, seconds: float) -> None:
        self._last, self._cost = step, seconds
        self._spent += seconds
        self._grace.spent += seconds
