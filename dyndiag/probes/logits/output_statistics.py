"""What a row of output logits is like, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**17
"""Logits worked on at a time: half a megabyte in float32, in a core's cache."""
_ACCELERATOR_BLOCK = 2**23
_SMALLEST = {torch.float32: -87.0, torch.float64: -700.0}
"""What an exponential is taken of, at least: beside the maximum's 1 it vanishes all the same, and
further down it takes thirty times as long."""


class Rows(NamedTuple):
    """Of each position, in float32 at least; (positions,) each."""

    highest: Tensor
    gap: Tensor
    """The largest logit less the second largest."""
    total: Tensor
    """Sum of the logits."""
    log_partition: Tensor
    """ln Σ e^y."""
    collapsed: Tensor
    """Whether Σ e^(y − max y) is exactly 1 in the logits' dtype."""


def rows(logits: Tensor, block: int | None = None) -> Rows:
    """Of logits (…, classes). Cost: an exponential per logit; one block in memory."""
    size = block or (BLOCK if logits.device.type == "cpu" else _ACCELERATOR_BLOCK)
    found = [_of(part) for part in _blocks(logits, max(1, size // logits.shape[-1]))]
    return found[0] if len(found) == 1 else Rows(*map(torch.cat, zip(*found, strict=True)))


def _blocks(logits: Tensor, count: int) -> Iterator[Tensor]:
    """Up to `count` rows at a time, without a copy of them all."""
    if logits.dim() == 2 or logits.is_contiguous():
        yield from logits.flatten(0, -2).split(count)
    else:
        for sequence in logits.unbind():
            yield from _blocks(sequence, count)


def _of(y: Tensor) -> Rows:
    dtype = y.dtype
    y = y if dtype == torch.float64 else y.float()
    highest, second = _two_largest(y)
    finite = highest.masked_fill(highest.isinf(), 0.0)
    shares = (y - finite.unsqueeze(-1)).clamp_min_(_SMALLEST[y.dtype]).exp_().sum(dim=-1)
    collapsed = shares.to(dtype) == 1
    return Rows(highest, highest - second, y.sum(dim=-1), highest + shares.log(), collapsed)


def _two_largest(y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of (rows, at least 2). By halves: three times as fast as `topk` of the whole."""
    half = y.shape[-1] // 2
    if half < 16:
        both = y.topk(2, dim=-1).values
        return both[:, 0], both[:, 1]
    left, right = y[:, :half], y[:, half : 2 * half]
    first, second = _two_largest(torch.maximum(left, right))
    second = torch.maximum(second, torch.minimum(left, right).amax(dim=-1))
    if 2 * half < y.shape[-1]:
        last = y[:, -1]
        second = torch.maximum(second, torch.minimum(first, last))
        first = torch.maximum(first, last)
    return first, second


class Targets(NamedTuple):
    """Of the positions with a target, in float64."""

    total: Tensor
    """Sum of the targets' logits."""
    zero_loss: Tensor
    """How many have a loss of exactly 0."""
    positions: Tensor


def targets(
    logits: Tensor, found: Rows, labels: Tensor, loss: Tensor | None, items: Tensor | float | None
) -> Targets | None:
    """Of labels (…,) of the logits' positions; those outside the classes are no target.

    Whether labels of sequences stand at their own position or at the one before, as in language
    models, the output's own loss tells (over `items` targets, else their mean); None without one.
    """
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        return None
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        return None
    plain, mean = _targets(logits, found, labels, items)
    if logits.dim() < 3:
        return plain
    if loss is None or loss.device != logits.device:
        return None
    loss = loss.detach().reshape(())
    after = torch.full_like(labels, -1)
    after[..., :-1] = labels[..., 1:]
    shifted, mean_shifted = _targets(logits, found, after, items)
    nearer = (mean_shifted - loss).abs() < (mean - loss).abs()
    return Targets(*(torch.where(nearer, s, p) for s, p in zip(shifted, plain, strict=True)))


def _targets(
    logits: Tensor, found: Rows, labels: Tensor, items: Tensor | float | None
) -> tuple[Targets, Tensor]:
    labels = labels.to(torch.int64)
    there = ((labels >= 0) & (labels < logits.shape[-1])).flatten()
    index = labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    y = logits.gather(-1, index).flatten().to(found.highest.dtype)
    zero = there & found.collapsed & (y == found.highest)
    count = there.sum(dtype=torch.float64)
    losses = (found.log_partition - y).where(there, 0.0)
    mean = losses.sum(dtype=torch.float64) / (count if items is None else items)
    total = y.where(there, 0.0).sum(dtype=torch.float64)
    return Targets(total, zero.sum(dtype=torch.float64), count), mean
