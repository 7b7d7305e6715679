"""A probe failed, so its values are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from dyndiag.values import Event

_AREA = "failures/"


@dataclass(eq=False)
class ProbeFailed:
    """The first failure of each probe, opened and closed at once; later ones are in the series."""

    kind: ClassVar[str] = "probe_failed"

    def __post_init__(self) -> None:
        self._seen: set[str] = set()

    @property
    def parameters(self) -> dict[str, float]:
        return asdict(self)

    def update(self, step: int, values: Mapping[str, float]) -> list[Event]:
        if values.keys() <= self._seen:  # nearly always
            return []
        new = values.keys() - self._seen
        failed = sorted(name for name in new if name.startswith(_AREA) and values[name])
        self._seen |= {name for name in new if not name.startswith(_AREA)} | set(failed)
        return [
            Event(
                self.kind,
                step,
                step,
                step,
                severity=1.0,
                series=(name,),
                details={"probe": name.removeprefix(_AREA)},
            )
            for name in failed
        ]
