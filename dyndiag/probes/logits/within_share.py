"""When to take a reading that is cheap, but not for nothing."""

from __future__ import annotations

from dyndiag import schedule
from dyndiag.schedule import Every

_FIRST_STEPS = 250
"""For each second of `schedule.GRACE`: steps that are seen whole, whatever that takes."""


class WithinShare:
    """As often as `at_most` in the first steps, and later as long as that takes at most a share
    of the training's time since then; else at odd multiples of that."""

    def __init__(self, share: float, at_most: Every | None = None) -> None:
        self._share, self._at_most = share, at_most or Every(1)
        self._steps = self._passed = 0
        self._since = self._spent = 0.0

    def due(self, step: int, training_seconds: float) -> bool:
        """Ask once a step. Training seconds exclude what readings took."""
        self._steps += 1
        if self._steps <= _FIRST_STEPS * schedule.GRACE:
            self._since, self._spent = training_seconds, 0.0
        if not self._at_most.due(step):
            return False
        self._passed += 1
        grace = schedule.GRACE / 8
        worth = self._share * schedule.credited(training_seconds - self._since, self._share, grace)
        if self._passed % 2 == 0 or self._spent > worth:
            return False
        self._passed = 0
        return True

    def paid(self, seconds: float) -> None:
        """A reading has cost `seconds`."""
        self._spent += seconds
