"""The median of the last few values, kept sorted so that a new value costs no sort."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


def median(values: Iterable[float]) -> float:
    """Middle value, or the mean of the two middle ones; of at least one value.

    >>> median([3.0, 1.0, 2.0, 10.0])
    2.5
    """
    return _middle(sorted(values))


class RunningMedian:
    """The median of the last `size` values; infinities are welcome, a NaN is not.

    >>> three = RunningMedian(3)
    >>> for value in (1.0, 9.0, 2.0, 8.0):
    ...     three.push(value)
    >>> three.value, list(three.values)
    (8.0, [9.0, 2.0, 8.0])
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: deque[float] = deque()
        self._sorted: list[float] = []

    def push(self, value: float) -> None:
        if len(self.values) == self.size:
            del self._sorted[bisect_left(self._sorted, self.values.popleft())]
        self.values.append(value)
        insort(self._sorted, value)

    @property
    def full(self) -> bool:
        return len(self.values) == self.size

    @property
    def value(self) -> float:
        return _middle(self._sorted)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
