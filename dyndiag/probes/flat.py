"""Tensors as flat pieces of a bounded size, so that nothing big is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Elements; a few blocks fit into a processor's cache, and keep an accelerator busy."""


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, in float32, or float64 if one of them is.

    Complex numbers count as two. The pieces may be views: they are not to be changed.
    """
    flats = [(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in tensors]
    double = any(flat.dtype == torch.float64 for flat in flats)
    dtype = torch.float64 if double else torch.float32
    for start in range(0, len(flats[0]), BLOCK):
        yield tuple([flat[start : start + BLOCK].to(dtype) for flat in flats])


def dots(ones: Sequence[Tensor], others: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ one · other of each pair, (n,), float64, on `device`.

    Within a block summed in float32 at least, over blocks in float64.
    """
    pairs = zip(ones, others, strict=True)
    return sums([[torch.dot(a, b) for a, b in blocks(*pair)] for pair in pairs], device)


def sums(parts: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Σ of each list of 0-d tensors, (n,), float64, on `device`."""
    together = [part.to(device) for some in parts for part in some]
    if not together:
        return torch.zeros(len(parts), dtype=torch.float64, device=device)
    counts = list(map(len, parts))
    values = torch.stack(together).double()
    if counts == [1] * len(parts):  # calls cost most on small tensors
        return values
    return torch.stack([of_one.sum() for of_one in values.split(counts)])


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of a flat tensor, in no order; all of them where there are fewer.

    They lie in the rows with the `count` largest maxima, which is quicker to search. NaN counts as
    largest.
    """
    if len(values) <= count:
        return values
    width = min(32, len(values) // (4 * count))
    if width > 1:
        whole = len(values) // width * width
        rows = values[:whole].view(-1, width)
        top = rows.amax(1).topk(count, sorted=False).indices
        candidates = rows.index_select(0, top).reshape(-1)
        values = torch.cat((candidates, values[whole:]))
    return values.topk(count, sorted=False).values


class Largest:
    """The `count` largest of all values that pass by, exactly.

    Keeps a million of them, or 8 · `count`. Cost: two reads of the values.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._found: list[Tensor] = []
        self._length, self._room = 0, max(8 * count, BLOCK)

    def add(self, values: Tensor) -> None:
        """Keeps the tensor itself for a while: it is not to be changed."""
        self._found.append(values.to(self._device))
        self._length += len(values)
        if self._length >= self._room:
            self._found = [self._together()]
            self._length = len(self._found[0])

    def smallest(self) -> Tensor:
        """Of the `count` largest; the smallest of all values where fewer came."""
        return self._together().amin()

    def _together(self) -> Tensor:
        return largest(torch.cat(self._found), self._count)
