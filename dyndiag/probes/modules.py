"""Which module a parameter belongs to, for series that are told per module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    """L2 norms of one tensor per parameter, over all of them and over each module's."""

    def __init__(self, parameter_names: Sequence[str]) -> None:
        owners = module_names(parameter_names)
        self.modules = tuple(dict.fromkeys(owners))
        position = {module: i + 1 for i, module in enumerate(self.modules)}
        self._positions = [position[owner] for owner in owners]
        self._index: dict[tuple[bool, ...], Tensor] = {}

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Squared norms, shape (1 + modules,), float64: over everything, then each module.

        NaN for a module without any tensor. Cost: one read of the tensors; no host sync.
        """
        present = tuple([tensor is not None for tensor in tensors])
        found = [_values(tensor) for tensor in tensors if tensor is not None]
        if not found:
            return torch.full((1 + len(self.modules),), torch.nan, dtype=torch.float64)
        device = found[0].device
        double = any(tensor.dtype == torch.float64 for tensor in found)
        norms = torch._foreach_norm(found, 2, dtype=torch.float64 if double else torch.float32)
        if any(norm.device != device for norm in norms):
            norms = tuple(norm.to(device) for norm in norms)
        # Each adds to everything and to its module, in one call: on small models calls cost most.
        squared = torch.stack(norms).double().square_().expand(2, -1)
        total = torch.zeros(1 + len(self.modules), dtype=torch.float64, device=device)
        total.put_(self._index_of(present, device), squared, accumulate=True)
        if not all(present):
            total[self._absent(present).to(device)] = torch.nan
        return total

    def _index_of(self, present: tuple[bool, ...], device: torch.device) -> Tensor:
        if present not in self._index:
            kept = [i for i, here in zip(self._positions, present, strict=True) if here]
            self._index[present] = torch.tensor([[0] * len(kept), kept], device=device)
        return self._index[present]

    def _absent(self, present: tuple[bool, ...]) -> Tensor:
        kept = {i for i, here in zip(self._positions, present, strict=True) if here}
        return torch.tensor([i not in kept and i > 0 for i in range(1 + len(self.modules))])


def _values(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
