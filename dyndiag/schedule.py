"""When a probe is due. Schedules see steps and seconds, never values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

GRACE = 2.0
"""Seconds of passes that every run may take, whatever their share: toy runs are seen whole."""
_INSTANT = 1e-3
"""Seconds; the logarithm of time begins here."""
_FIRST_STEPS = 250
"""For each second of `GRACE`: steps that are read whole, whatever that takes."""


class Schedule(Protocol):
    def due(self, step: int, training_seconds: float, credited_seconds: float) -> bool:
        """Whether to measure at this step. Training seconds exclude what probes took."""
        ...

    def paid(self, step: int, seconds: float) -> None:
        """A measurement was taken at `step` and cost `seconds`."""
        ...


@dataclass(frozen=True)
class Every:
    """Every n-th step, from step 0; every step before `dense_until`.

    >>> [step for step in range(30) if Every(11).due(step)]
    [0, 11, 22]
    """

    n: int
    dense_until: int = 0

    def due(self, step: int, training_seconds: float = 0, credited_seconds: float = 0) -> bool:
        return step % self.n == 0 or step < self.dense_until

    def paid(self, step: int, seconds: float) -> None:
        pass


def credited(training_seconds: float, share: float, grace: float) -> float:
    """The training time that probes' shares are shares of, so that toy runs are seen whole.

    Grows with the logarithm of time until `share` of it is worth `grace` seconds, and is the time
    itself from there on: probes that keep to their shares of it have never taken more than
    max(grace, share · training time), and have taken it evenly over the logarithm of time.

    >>> [round(0.05 * credited(t, share=0.05, grace=2.0), 2) for t in (0.1, 1.0, 10.0, 40.0, 100.0)]
    [0.87, 1.3, 1.74, 2.0, 5.0]
    """
    whole = grace / share
    if training_seconds >= whole:
        return training_seconds
    return whole * math.log1p(training_seconds / _INSTANT) / math.log1p(whole / _INSTANT)


class Budget:
    """As often as a share of training time allows, at odd intervals.

    A sample is taken once what has been saved up pays for it, so that more than the share has
    never been spent, but for errors in foreseeing a sample's cost: a running mean, and for the
    first `gradients` times the quickest step. That first sample may be taken in advance, if it
    costs at most `advance` seconds. A pause leads to no burst: at most eight samples' worth is
    kept.
    """

    def __init__(self, share: float, gradients: float = 0.0, advance: float = 0.0) -> None:
        self._share, self._gradients, self._advance = share, gradients, advance
        self._last: int | None = None
        self._quickest = math.inf
        self._cost = self._saved = 0.0
        self._training_before = self._credited_before = 0.0

    def due(self, step: int, training_seconds: float, credited_seconds: float) -> bool:
        self._quickest = min(self._quickest, training_seconds - self._training_before)
        self._saved += self._share * (credited_seconds - self._credited_before)
        self._training_before, self._credited_before = training_seconds, credited_seconds
        if self._last is None:
            self._cost = self._gradients * self._quickest
            if self._cost <= self._advance:
                return True
        else:
            self._saved = min(self._saved, 8 * self._cost)
            if (step - self._last) % 2 == 0:
                return False
        return self._saved >= self._cost

    def paid(self, step: int, seconds: float) -> None:
        # The mean: a certified sample costs several provisional ones, and the last one's cost
        # alone would make samples come in bursts.
        self._cost = seconds if self._last is None else 0.8 * self._cost + 0.2 * seconds
        self._last = step
        self._saved -= seconds


class FixedInterval:
    """At one fixed odd interval, for what must be compared over equal intervals.

    (A divergence over a smooth drift grows with the square of its interval.) Where the next
    sample would overspend the share, the interval is made three times longer; it never becomes
    shorter.
    """

    def __init__(self, share: float, interval: int = 11) -> None:
        self._share = share
        self.interval = interval
        self._last: int | None = None
        self._cost = self._spent = 0.0

    def due(self, step: int, training_seconds: float, credited_seconds: float) -> bool:
        if self._last is None:
            return True
        if step - self._last < self.interval:
            return False
        if self._spent + self._cost <= self._share * credited_seconds:
            return True
        self.interval *= 3
        return False

    def paid(self, step: int, seconds: float) -> None:
        self._last, self._cost = step, seconds
        self._spent += seconds


class WithinShare:
    """For readings that are cheap, but not for nothing: as often as `at_most` in the first steps
    (500), and later as long as they take at most a share of the time since then; else at odd
    multiples of that. (Or a quarter of a second in all, if that is more, spread over the logarithm
    of time.)"""

    def __init__(self, share: float, at_most: Every | None = None) -> None:
        self._share, self._at_most = share, at_most or Every(1)
        self._steps = self._passed = 0
        self._since = self._spent = 0.0

    def due(self, step: int, seconds: float) -> bool:
        """Ask once a step; `seconds`: any clock's."""
        self._steps += 1
        if self._steps <= max(1, _FIRST_STEPS * GRACE):
            self._since, self._spent = seconds, 0.0
        if not self._at_most.due(step):
            return False
        self._passed += 1
        worth = self._share * credited(seconds - self._since, self._share, GRACE / 8)
        if self._passed % 2 == 0 or self._spent > worth:
            return False
        self._passed = 0
        return True

    def paid(self, seconds: float) -> None:
        """A reading has cost `seconds`."""
        self._spent += seconds
