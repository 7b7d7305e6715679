"""Micro-batches, and the one loss whose gradient the optimizer applied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.errors import DyndiagError

Batch = Any
"""A tensor, or any nest of tuples, lists, mappings and dataclasses that holds tensors."""
LossFunction = Callable[[nn.Module, Batch], Tensor]
"""`loss_fn(model, batch)`: a scalar tensor, the mean over the batch."""


@dataclass(frozen=True)
class MicroBatches:
    """The batches of one optimizer step, and each one's weight in the step's loss.

    With gradient accumulation over k equal batches the weights are 1/k each (the default).
    """

    batches: tuple[Batch, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            count = len(self.batches)
            object.__setattr__(self, "weights", (1 / max(1, count),) * count)

    def loss(self, loss_fn: LossFunction, model: nn.Module) -> Tensor:
        """The step's loss, a scalar with its graph: Σ weight · loss_fn(model, batch)."""
        total: Tensor | None = None
        for batch, weight in zip(self.batches, self.weights, strict=True):
            part = loss_fn(model, batch)
            check_scalar_loss(part)
            part = part if weight == 1 else weight * part
            total = part if total is None else total + part
        if total is None:
            raise DyndiagError("no batch to measure on: the step saw no micro-batch")
        return total

    @property
    def size(self) -> int:
        """Number of examples: the first tensors' lengths, added up."""
        return sum(batch_size(batch) for batch in self.batches)


@dataclass(frozen=True)
class ForwardCall:
    """A batch as the model's own forward saw it."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def as_micro_batches(batch: Batch) -> MicroBatches:
    """One batch as a step of its own; micro-batches stay what they are."""
    return batch if isinstance(batch, MicroBatches) else MicroBatches((batch,))


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model computes by itself: its output's `.loss`.

    A mapping is passed as keywords, a tuple or list as positions, anything else as it is.
    Raises DyndiagError where the output has no `.loss`.
    """
    if isinstance(batch, ForwardCall):
        output = model(*batch.args, **batch.kwargs)
    elif isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple | list):
        output = model(*batch)
    else:
        output = model(batch)
    loss = loss_of(output)
    if loss is None:
        raise DyndiagError(
            "the model's output has no .loss, so the monitor cannot compute the loss by itself: "
            "pass loss_fn(model, batch) -> scalar"
        )
    return loss


def loss_of(output: Any) -> Tensor | None:
    """An output's own loss, by attribute or by key; None if it has none."""
    if isinstance(output, Tensor):
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def check_scalar_loss(loss: object) -> None:
    """Raises DyndiagError, in words for the person who wrote the loss function."""
    if not isinstance(loss, Tensor):
        raise DyndiagError(
            f"the loss must be a scalar tensor, but it is a {type(loss).__name__}: "
            "return the tensor that you call .backward() on"
        )
    if loss.numel() != 1:
        raise DyndiagError(
            f"the loss must be one number, but it has shape {tuple(loss.shape)}: "
            "reduce it as your training loop does, for example with .mean()"
        )


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of the batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors(item)
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from tensors(item)
    elif is_dataclass(batch):
        for part in fields(batch):
            yield from tensors(getattr(batch, part.name))


def batch_size(batch: Batch) -> int:
    """Length of the batch's first tensor that has one; 1 without any."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.dim() > 0), 1)


def copy_batch(batch: Batch) -> Batch:
    """A copy of the same types that later changes of the original do not reach.

    Its tensors are leaves; those that required a gradient still do.
    """
    copies: dict[int, Any] = {}
    for tensor in tensors(batch):
        copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return copy.deepcopy(batch, copies)


def check_probe_batch(batch: Batch) -> None:
    """Raises DyndiagError for a batch with nothing in it."""
    found = list(tensors(batch))
    if any(tensor.dim() > 0 and tensor.numel() == 0 for tensor in found) or (
        not found and isinstance(batch, tuple | list | Mapping)
    ):
        raise DyndiagError(
            "the probe batch is empty: pass a batch as your training loop uses it, "
            "with at least one example"
        )


def same_data(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same numbers; compares every tensor."""
    ours, theirs = list(tensors(one)), list(tensors(other))
    return len(ours) == len(theirs) > 0 and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
        for a, b in zip(ours, theirs, strict=True)
    )
