"""The data that an operator is summed over: batches, their weights, one set of random masks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

_SEED = 0
"""Of the random streams inside every forward pass: one dropout mask for all products."""


def read_once(model: nn.Module, data: Any) -> list[Any]:
    """The batches of a loader, whose own random generators stay where they were."""
    if not isinstance(data, DataLoader):
        return [data]
    owners = (data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
    generators = [g for o in owners if isinstance(g := getattr(o, "generator", None), Generator)]
    states = [g.get_state() for g in generators]
    try:
        with no_trace(model):
            batches = list(data)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    if not batches:
        raise DyndiagError(
            "the DataLoader holds no batch: with drop_last=True it takes at least one full batch"
        )
    return batches


def batch_weights(
    batches: Sequence[Any], reduction: str, size: Callable[[Any], int] | None
) -> list[float]:
    if reduction not in ("mean", "sum"):
        raise DyndiagError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if reduction == "sum" or len(batches) == 1:
        return [1.0] * len(batches)
    sizes = [(size or _length)(batch) for batch in batches]
    return [n / sum(sizes) for n in sizes]


def _length(batch: Any) -> int:
    tensor = next(_tensors(batch), None)
    if tensor is None or tensor.dim() == 0:
        raise DyndiagError(
            f"a batch of type {type(batch).__name__} does not show how many examples it holds: "
            "pass size=, a function from a batch to that number"
        )
    return len(tensor)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _tensors(item)


def fix_random_streams() -> None:
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_SEED)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(_SEED)
