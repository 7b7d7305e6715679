"""One number a parameter, brought together over everything and over each module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dyndiag.probes.modules import MOST_PARTS, module_names

_NEUTRAL = {"sum": 0.0, "largest": -torch.inf, "smallest": torch.inf}


class ByModule:
    """Which parameters count, and how their numbers make up their modules'.

    `counts`: one flag a parameter; numbers come without those that do not count, in their order.
    More than 128 modules are not told apart.
    """

    def __init__(
        self, names: tuple[str, ...], counts: tuple[bool, ...], device: torch.device
    ) -> None:
        self._made_for = names, counts, device
        kept = [i for i, count in enumerate(counts) if count]
        owners = module_names(names)
        members: dict[str, list[int]] = {}
        for position, i in enumerate(kept):
            members.setdefault(owners[i], []).append(position)
        if len(members) > MOST_PARTS:
            members = {}
        self.modules = tuple(members)
        longest = max(map(len, members.values()), default=0)
        rows = [[*row, *[len(kept)] * (longest - len(row))] for row in members.values()]
        self._rows = torch.tensor(rows, dtype=torch.long, device=device).reshape(len(rows), longest)
        self._kept = torch.tensor(kept, dtype=torch.long, device=device)
        self._all = len(kept) == len(names)

    def fits(self, names: tuple[str, ...], counts: tuple[bool, ...], device: torch.device) -> bool:
        """Whether it was made for these. What is made anew at every step would cost a copy."""
        return self._made_for == (names, counts, device)

    def names(self, series: str) -> tuple[str, ...]:
        """Of the number over everything, and of each module's."""
        return (series, *(f"{series}/{module}" for module in self.modules))

    def kept(self, numbers: Tensor) -> Tensor:
        """Of one number a parameter, those that count."""
        return numbers if self._all else numbers.take(self._kept)

    def over(self, numbers: Tensor, how: Literal["sum", "largest", "smallest"]) -> Tensor:
        """(1 + modules,): over everything, then over each module. NaN goes through."""
        neutral = _NEUTRAL[how]
        padded = torch.nn.functional.pad(numbers, (0, 1), value=neutral)
        groups = padded.take(self._rows)
        if how == "sum":
            every, each = numbers.sum(), groups.sum(1)
        elif how == "largest":
            every, each = numbers.amax(), groups.amax(1) if self.modules else groups.sum(1)
        else:
            every, each = numbers.amin(), groups.amin(1) if self.modules else groups.sum(1)
        return torch.cat((every.reshape(1), each))


def by_module(
    last: ByModule | None, names: tuple[str, ...], counts: Sequence[bool], device: torch.device
) -> ByModule:
    """The last one, where it still fits."""
    counts = tuple(counts)
    if last is not None and last.fits(names, counts, device):
        return last
    return ByModule(names, counts, device)
