"""Which edge ratios have to be certified, because an edge event may rest on them."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_SMOOTH = 5
_CONSECUTIVE = 3
_MARGIN = 0.01
"""How far a provisional ratio, or one certified to 1 %, may lie from the one that is judged."""
_TIE = 1e-3
"""What a provisional value may be off where nothing was missed."""


class EdgeWatch:
    """Follows the edge ratio as the edge-of-stability detector does, one sample ahead of it.

    That detector lets only certified ratios open, top or close an event, so a provisional one that
    might has to be certified before it is written. Sufficient: whatever would open an event, or
    lies above the highest certified ratio of the present stay, or takes the running median out of
    the band, each with a margin for what the median's other ratios may be off. In between, at the
    edge as away from it, provisional ratios do.
    """

    gate, lower, upper, rise = 0.75, 0.8, 1.3, 1.25
    leaves_below, leaves_above = 0.7, 1.5

    def __init__(self) -> None:
        self._lately: deque[float] = deque(maxlen=_SMOOTH)
        self._lowest = math.inf
        self._at_edge = False
        self._highest = -math.inf

    def decides(self, ratio: float) -> bool:
        """Whether an edge event may open, top or close on this ratio, the next one."""
        lately = [*self._lately, ratio][-_SMOOTH:]
        if self._at_edge:
            return ratio > self._highest * (1 - _TIE) or not self._stays(median(lately), _MARGIN)
        return self._opens(lately, _MARGIN)

    def take(self, ratio: float, *, certified: bool) -> None:
        """The ratio that is written: finite, converged or provisional, and not of a warm-up."""
        self._lately.append(ratio)
        lately = list(self._lately)
        if len(lately) == _SMOOTH:
            self._lowest = min(self._lowest, median(lately))
        if not certified:
            return
        if not self._at_edge and self._opens(lately, 0.0):
            self._at_edge, self._highest = True, -math.inf
        if self._at_edge:
            self._highest = max(self._highest, ratio)
            self._at_edge = self._stays(median(lately), 0.0)

    def _opens(self, lately: list[float], margin: float) -> bool:
        if len(lately) < _SMOOTH:
            return False
        middle = median(lately)
        return (
            min(lately[-_CONSECUTIVE:]) >= self.gate * (1 - margin)
            and self.lower * (1 - margin) <= middle <= self.upper * (1 + margin)
            and middle >= self.rise * min(self._lowest, middle) * (1 - margin)
        )

    def _stays(self, middle: float, margin: float) -> bool:
        return self.leaves_below * (1 + margin) <= middle <= self.leaves_above * (1 - margin)
