"""Which weights of a model are matrices or kernels, and what each is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LOOKED_UP = "tables of embeddings are looked up row by row"
_STACKED = "more than two dimensions, and no convolution: which matrices they hold is not known"
_OTHER_KIND = "complex, sparse or sharded"


@dataclass(frozen=True)
class WeightTensor:
    """A matrix, or the kernel of a convolution, as `module` uses it."""

    name: str
    """The module's, or the parameter's where the module has several."""
    module: nn.Module
    tensor: Tensor

    @property
    def overlaps(self) -> bool:
        """Whether it is a kernel whose windows overlap or that has groups: else it acts on patches
        as a matrix does, its first dimension against all others."""
        conv = self.module
        if not isinstance(conv, CONVOLUTIONS) or self.tensor.dim() < 3:
            return False
        taps = zip(self.tensor.shape[2:], conv.stride, conv.dilation, strict=True)
        return conv.groups > 1 or any((k - 1) * d >= s for k, s, d in taps)


def weight_tensors(
    model: nn.Module, trainable: set[int]
) -> tuple[list[WeightTensor], dict[str, list[str]]]:
    """Those of which singular values make sense, in model order; names of the others, by reason.

    Of parameters whose id is in `trainable`, or of which such ones are a part by parametrization.
    A tied weight counts once, where it is not an embedding.
    """
    found: dict[int, tuple[str, str, nn.Module, Tensor]] = {}
    tables: dict[int, tuple[str, Tensor]] = {}
    left_out: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in _owned(path, module, trainable):
            full = f"{path}.{name}" if path else name
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                tables[id(tensor)] = full, tensor  # held, so that its id remains its own
            elif (reason := _unreadable(module, tensor)) is None:
                found.setdefault(id(tensor), (path or full, full, module, tensor))
            else:
                left_out.setdefault(reason, []).append(full)
    for key, (full, _) in tables.items():
        if key not in found:
            left_out.setdefault(_LOOKED_UP, []).append(full)
    several = Counter(path for path, *_ in found.values())
    return [
        WeightTensor(path if several[path] == 1 else full, module, tensor)
        for path, full, module, tensor in found.values()
    ], left_out


def _owned(path: str, module: nn.Module, trainable: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of two dimensions or more that a module uses as its own."""
    if "parametrizations" in path.split("."):
        return  # parts of the weight that they make
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return  # factors, one an entry, in whatever shape
    own = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) in trainable]
    if parametrize.is_parametrized(module):
        made = module.parametrizations
        assert isinstance(made, nn.ModuleDict)
        for name, parts in made.items():
            if any(id(part) in trainable for part in parts.parameters()):
                own.append((name, getattr(module, name)))
    yield from ((name, tensor) for name, tensor in own if tensor.dim() > 1 and tensor.numel() > 0)


def _unreadable(module: nn.Module, tensor: Tensor) -> str | None:
    """Why no singular values are taken of it; None if they are."""
    if tensor.is_complex() or tensor.layout is not torch.strided or hasattr(tensor, "placements"):
        return _OTHER_KIND
    kernel = isinstance(module, CONVOLUTIONS) and tensor.shape == module.weight.shape
    return None if tensor.dim() == 2 or kernel else _STACKED
