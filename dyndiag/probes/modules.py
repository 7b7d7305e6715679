"""Which module a parameter belongs to, for series that are told per module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_Indices = tuple[Tensor, Tensor, Tensor]
MOST_PARTS = 128
"""More parts than this belong into arrays, not into columns: names are cut shorter instead."""


def module_names(parameter_names: Sequence[str]) -> tuple[str, ...]:
    """The module of each parameter: its name less the last part, cut to at most 128 modules.

    >>> module_names(["blocks.0.attn.weight", "blocks.0.attn.bias", "head.weight"])
    ('blocks.0.attn', 'blocks.0.attn', 'head')
    """
    owners = [name.rpartition(".")[0] or name for name in parameter_names]
    depth = max((owner.count(".") + 1 for owner in owners), default=1)
    while depth > 1 and len(set(owners)) > MOST_PARTS:
        depth -= 1
        owners = [".".join(owner.split(".")[:depth]) for owner in owners]
    return tuple(owners)


class ModuleNorms:
    """From the L2 norms of parameters to those of everything and of each module."""

    def __init__(self, parameter_names: Sequence[str]) -> None:
        owners = module_names(parameter_names)
        self.modules = tuple(dict.fromkeys(owners))
        position = {module: i + 1 for i, module in enumerate(self.modules)}
        self._positions = [position[owner] for owner in owners]
        self._index: dict[tuple[torch.device, tuple[bool, ...] | None], _Indices] = {}

    def squares(self, norms: Tensor, present: tuple[bool, ...] | None = None) -> Tensor:
        """Squared norms, shape (1 + modules,), float64: over everything, then each module.

        `norms`: of each parameter, float64; `present` tells which count, where not all do. NaN for
        a module without any. No host sync.
        """
        if present is not None and all(present):
            present = None
        key = norms.device, present
        if key not in self._index:
            self._index[key] = self._indices(*key)
        kept, index, absent = self._index[key]
        squared = norms.square()
        if present is not None:
            squared = squared[kept]
        total = torch.zeros(1 + len(self.modules), dtype=torch.float64, device=norms.device)
        # Each adds to everything and to its module, in one call: on small models calls cost most.
        total.put_(index, squared.expand(2, -1), accumulate=True)
        return total if present is None else total.masked_fill_(absent, torch.nan)

    def on_host(self, norms: Sequence[float]) -> list[float]:
        """Norms over everything, then of each module, from numbers of all parameters."""
        sums = [0.0] * (1 + len(self.modules))
        for position, norm in zip(self._positions, norms, strict=True):
            sums[position] += norm * norm
        sums[0] = sum(sums)
        return [math.sqrt(square) for square in sums]

    def _indices(self, device: torch.device, present: tuple[bool, ...] | None) -> _Indices:
        """Which norms are kept, where each adds, and which sums nothing adds to."""
        every = range(len(self._positions))
        kept = [i for i in every if present is None or present[i]]
        modules = [self._positions[i] for i in kept]
        filled = {0, *modules}
        absent = [i not in filled for i in range(1 + len(self.modules))]
        return (
            torch.tensor(kept, dtype=torch.long, device=device),
            torch.tensor([[0] * len(kept), modules], device=device),
            torch.tensor(absent, device=device),
        )
