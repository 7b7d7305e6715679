"""The share of right classes, where a batch plainly is one of classification."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import tensors

_IGNORED = -100
"""The target that cross-entropy leaves out."""


@contextmanager
def outputs_of(model: nn.Module, *, wanted: bool) -> Iterator[list[Any]]:
    """A list that receives the output of every call of the model, if wanted."""
    outputs: list[Any] = []
    if not wanted:
        yield outputs
        return
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def hits(outputs: list[Any], batch: Any) -> tuple[Tensor, int] | None:
    """How many examples are classified right, a 0-d tensor, and of how many.

    None unless the model was called once and gave scores (examples, classes), and exactly one
    tensor of the batch holds as many whole numbers, each of them a class (or −100, left out).
    """
    if len(outputs) != 1:
        return None
    scores = _scores(outputs[0])
    if scores is None or scores.dim() != 2 or scores.shape[1] < 2:
        return None
    whole = [
        t
        for t in tensors(batch)
        if t.dim() == 1
        and len(t) == len(scores)
        and not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    ]
    if len(whole) != 1:
        return None
    targets = whole[0].to(scores.device)
    counted = targets != _IGNORED
    in_range = (targets >= 0) & (targets < scores.shape[1])
    if not bool((in_range | ~counted).all()):
        return None
    return ((scores.argmax(1) == targets) & counted).sum(), int(counted.sum())


def share_of(found: list[tuple[Tensor, int] | None]) -> float:
    """Right of all; NaN where one of the batches does not say."""
    known = [one for one in found if one is not None]
    seen = sum(count for _, count in known)
    if len(known) < len(found) or seen == 0:
        return math.nan
    return int(torch.stack([right for right, _ in known]).sum()) / seen


def _scores(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    else:
        output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None
