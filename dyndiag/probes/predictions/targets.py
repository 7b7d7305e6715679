"""Which classes a batch's targets are, and the loss at each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch, ForwardCall, LossFunction, tensors
from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.divergence import log_partition
from dyndiag.probes.predictions.outputs import Pass, one_pass

_NAMES = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Targets:
    """The target class of each position, where one counts."""

    classes: Tensor
    """(positions,), int64; 0 where none counts."""
    count: Tensor
    """(positions,), bool: there is a target, and no mask hides the position."""
    losses: Tensor
    """(positions,), float32: −ln p(target), 0 where none counts."""
    verified: bool
    """Whether the batch's loss is the mean of `losses`."""


@torch.no_grad()
def targets_of(passed: Pass, log_z: Tensor | None = None) -> Targets | None:
    """The targets of a forward pass, found among the integer tensors of its batch; None if not.

    Taken is the tensor whose mean cross-entropy with the logits is the loss of the pass: as it
    stands, or moved by one position, where the model or the loss function shifts it (language
    models). Where the loss says nothing (there is none, or it is not such a mean), it is the
    tensor of the scores' shape under `labels`, `label`, `targets`, `target`, `y`, or the last
    such, unless the model reads the same at the same positions. Negative targets (−100) do not
    count. `log_z`: the scores' log-partition, if known.
    """
    if passed.logits is None:
        return None
    scores, mask = passed.scores, passed.visible
    log_z = log_partition(scores) if log_z is None else log_z
    proven: dict[_Kind, Targets] = {}
    suggested: Targets | None = None
    for kind, classes in _candidates(passed):
        counted = classes >= 0
        if not bool((classes < scores.shape[-1]).all() & counted.any()):
            continue
        safe = classes.where(counted, 0)
        at_target = scores.gather(1, safe[:, None]).squeeze(1).float()
        losses = (log_z - at_target).where(counted, 0.0)
        shown = counted if mask is None else counted & mask
        verified = _is_loss_of(passed, losses, shown)
        targets = Targets(safe, shown, losses.where(shown, 0.0), verified)
        if verified or (mask is not None and _is_loss_of(passed, losses, counted)):
            proven.setdefault(kind, targets)
        elif kind is _Kind.PLAIN and suggested is None:
            suggested = targets
    # At the start every candidate's loss may be ln(classes): then the likeliest kind is taken.
    return proven[min(proven)] if proven else suggested


class _Kind(IntEnum):
    """How a tensor of the batch would be the targets, likeliest first."""

    PLAIN = 0
    MOVED = 1
    """By one position, or of another shape with as many elements."""
    READ = 2
    """As it stands, but the model reads the same at the same positions: it would have to copy."""


def _candidates(passed: Pass) -> Iterator[tuple[_Kind, Tensor]]:
    """Classes (positions,) by what is known of each tensor; those named as targets first."""
    assert passed.logits is not None
    shape = passed.logits.shape[:-1]
    named = {
        name: tensor.detach().to(passed.logits.device)
        for name, tensor in _named_tensors(passed.batch)
        if _is_integer(tensor)
    }
    order = [name for name in _NAMES if name in named]
    order += [name for name in reversed(named) if name not in order]
    inputs = [t for t in _inputs(passed.call) if _is_integer(t) and t.shape == shape]
    for name in order:
        classes = named[name]
        longer = len(shape) == 2 and classes.shape == (shape[0], shape[1] + 1)
        if classes.numel() != shape.numel() and not longer:
            continue
        classes = classes.long()
        if classes.shape == shape:
            read = any(bool(((t.to(classes) == classes) | (classes < 0)).all()) for t in inputs)
            yield _Kind.READ if read else _Kind.PLAIN, classes.flatten()
            if len(shape) == 2:
                moved = torch.full_like(classes, -100)
                moved[:, :-1] = classes[:, 1:]
                yield _Kind.MOVED, moved.flatten()
        elif longer:
            yield _Kind.MOVED, classes[:, 1:].flatten()
        else:
            yield _Kind.MOVED, classes.flatten()


def _is_integer(tensor: Tensor) -> bool:
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return tensor.dtype in kinds and tensor.dim() > 0


def _inputs(call: ForwardCall) -> list[Tensor]:
    """What the model read, but for what it compares its output with."""
    read = {name: value for name, value in call.kwargs.items() if name not in _NAMES}
    return [*tensors(call.args), *tensors(read)]


def _is_loss_of(passed: Pass, losses: Tensor, counted: Tensor) -> bool:
    """Whether the pass's loss is the mean of these, to the precision in which it was computed."""
    if passed.loss is None or passed.logits is None:
        return False
    divisor: Any = counted.sum()
    told = passed.call.kwargs.get("num_items_in_batch")  # of the whole step, by Hugging Face
    if told is not None:
        divisor = torch.as_tensor(told, device=losses.device)
    mean = losses.where(counted, 0.0).sum(dtype=torch.float64) / divisor
    loss = passed.loss.to(losses.device).double()
    coarsest = max(torch.finfo(t.dtype).eps for t in (passed.loss, passed.logits))
    tolerance = max(1e-4, 2 * coarsest) * torch.maximum(loss.abs(), mean.abs()) + 1e-6
    return bool((mean - loss).abs() <= tolerance)


def correct_predictions(
    model: nn.Module, loss_fn: LossFunction | None, batch: Batch
) -> tuple[Tensor, int]:
    """How many predictions are right (0-d tensor), out of how many, on one batch.

    The prediction is the largest of the output's class scores. Raises DyndiagError if there are
    no class scores, or no targets (see `targets_of`).
    """
    passed = one_pass(model, loss_fn, batch)
    if passed.logits is None:
        raise DyndiagError(
            "the model's output holds no class scores of shape (…, classes), so there is no "
            "accuracy to measure: return logits, or an output with .logits"
        )
    targets = targets_of(passed)
    if targets is None:
        raise DyndiagError(
            f"no target found in the evaluation batch: expected an integer tensor of shape "
            f"{tuple(passed.logits.shape[:-1])} that the model does not read as its input, found "
            f"{', '.join(str(tuple(t.shape)) for _, t in _named_tensors(batch)) or 'no tensor'}"
        )
    right = (passed.scores.argmax(dim=-1) == targets.classes) & targets.count
    return right.sum(), int(targets.count.sum())


def _named_tensors(batch: Batch, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, item in batch.items():
            yield from _named_tensors(item, str(key))
    elif isinstance(batch, tuple | list):
        for i, item in enumerate(batch):
            yield from _named_tensors(item, f"{name}{i}")
    elif is_dataclass(batch) and not isinstance(batch, type):
        for part in fields(batch):
            yield from _named_tensors(getattr(batch, part.name), part.name)
