"""A value becomes NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from dyndiag.detectors.estimates import is_column
from dyndiag.values import Event

_ALWAYS = ("train/loss", "gradients/norm")
_NAMED = 5
"""So many series are named in an event."""


@dataclass(eq=False)
class NonFinite:
    """A loss or gradient norm that is not finite, or another value that no longer is.

    The first series is the one to look at: the loss if it is among those of the first step, else
    the first by name. Others that follow are counted, and `loss_at` is the loss's own step. The
    event closes where all of them are finite again; one that is not measured keeps its state.

    A NaN is no failure where a quantity has no value (a ratio of nothing): series other than loss
    and gradient norm count once they have been finite, and `stability/` not at all. A gradient
    scaler looks for its scale by skipping steps with infinite gradients, so those count after
    `skips` skipped steps in a row, and then from the first.

    Severity: how many series.
    """

    kind: ClassVar[str] = "non_finite"

    skips: int = 20

    def __post_init__(self) -> None:
        self._once_finite: set[str] = set(_ALWAYS)
        self._skipping: _Outbreak | None = None
        self._open: _Outbreak | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        if self._open is None and math.isfinite(sum(values.values())):  # nearly always
            self._once_finite.update(values)
            self._skipping = None
            return []
        finite = {name for name, value in values.items() if math.isfinite(value)}
        bad = {name: values[name] for name in values.keys() - finite if self._counts(name)}
        self._once_finite |= finite
        if self._open is not None:
            return self._go_on(self._open, step, bad, finite)
        if bad and values.get("train/skipped") == 1 and _only_gradients(bad):
            self._skipping = self._skipping or _Outbreak.of(step, bad)
            self._skipping.rows += 1
            if self._skipping.rows < self.skips:
                return []
            self._open, self._skipping = self._skipping, None
            return [self._open.event()]
        self._skipping = None
        if not bad:
            return []
        self._open = _Outbreak.of(step, bad)
        return [self._open.event()]

    def _go_on(
        self, outbreak: _Outbreak, step: int, bad: Mapping[str, float], finite: set[str]
    ) -> list[Event]:
        outbreak.still -= finite
        changed = outbreak.add(step, bad)
        if not outbreak.still:
            outbreak.end, self._open = step, None
            changed = True
        return [outbreak.event()] if changed else []

    def _counts(self, name: str) -> bool:
        known = name in self._once_finite and not name.startswith("stability/")
        return known and not is_column(name)


def _only_gradients(names: Iterable[str]) -> bool:
    return all(name.startswith(("gradients/", "updates/")) for name in names)


@dataclass
class _Outbreak:
    start: int
    series: tuple[str, ...]
    value: float
    peak: int = 0
    rows: int = 0
    loss_at: int | None = None
    still: set[str] = field(default_factory=set)
    ever: set[str] = field(default_factory=set)
    end: int | None = None

    @classmethod
    def of(cls, step: int, bad: Mapping[str, float]) -> _Outbreak:
        series = sorted(bad, key=lambda name: (name != "train/loss", name))
        outbreak = cls(step, tuple(series[:_NAMED]), bad[series[0]])
        outbreak.add(step, bad)
        return outbreak

    def add(self, step: int, bad: Mapping[str, float]) -> bool:
        """Whether a series is among them for the first time."""
        new = bad.keys() - self.ever
        self.still |= bad.keys()
        self.ever |= new
        if new:
            self.peak = step
        if "train/loss" in new:
            self.loss_at = step
        return bool(new)

    def event(self) -> Event:
        details: dict[str, float | str] = {
            "first": self.series[0],
            "value": str(self.value),
            "series": len(self.ever),
        }
        if self.loss_at is not None:
            details["loss_at"] = self.loss_at
        return Event(
            NonFinite.kind,
            self.start,
            self.peak,
            self.end,
            severity=float(len(self.ever)),
            series=self.series,
            details=details,
        )
