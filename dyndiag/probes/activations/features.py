"""Hidden activations as samples × features, and what their spread tells."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import tensors

MOST_ROWS = 256
"""Samples that are kept of a layer for what costs their square."""
_COLUMNS = 4096
"""Features taken at a time."""
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim")


def hidden_of(output: Any) -> Tensor | None:
    """The hidden activations in a module's output; None where there are none.

    The output's `last_hidden_state`, else the first floating tensor in it of two dimensions or
    more (the states of all steps of an LSTM, not the last one's).
    """
    if isinstance(output, Mapping) and _readable(output.get("last_hidden_state")):
        return output["last_hidden_state"]
    return next((tensor for tensor in tensors(output) if _readable(tensor)), None)


def _readable(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and tensor.dim() > 1
        and tensor.numel() > 0
    )


def feature_axis(shape: torch.Size, after: nn.Module | None) -> int | None:
    """Which dimension of activations holds the features; None if that cannot be told.

    `after` is the layer with parameters that ran last. Channels come first after convolutions and
    their norms; else last, if the size fits that layer's, or a half or a third of it (as where
    a gate is cut off).
    """
    if len(shape) == 2:
        return 1
    width = next((getattr(after, name) for name in _WIDTHS if hasattr(after, name)), None)
    if isinstance(after, _CHANNELS_FIRST):
        return -1 if shape[-1] == width != shape[1] else 1
    if shape[-1] == width or (len(shape) == 3 and width in (None, 2 * shape[-1], 3 * shape[-1])):
        return -1
    return 1 if len(shape) > 3 and (after is None or shape[1] == width) else None


def samples(hidden: Tensor, axis: int, visible: Tensor | None = None) -> Tensor:
    """Activations as (samples, features): a token or a place in an image is a sample.

    `visible`: boolean (batch, tokens); where it fits, the tokens that it hides are left out.
    """
    rows = hidden.detach().movedim(axis, -1)
    places = rows.shape[:-1]
    rows = rows.flatten(0, -2)
    if visible is None or visible.shape != places:
        return rows
    return rows[visible.to(rows.device).flatten()]


@functools.lru_cache(maxsize=64)
def spread(count: int, most: int) -> Tensor:
    """At most `most` of `count` positions, in order: one of each of as many equal stretches.

    Always the same ones, and not at one distance, which could fall in with the length of a
    sequence and pick the same tokens of all.
    """
    if count <= most:
        return torch.arange(count)
    borders = torch.arange(most + 1) * count // most
    where = (torch.arange(most, dtype=torch.float64) * 0.6180339887498949).frac()  # golden ratio
    return borders[:-1] + (where * borders.diff()).long()


def spread_rows(rows: Tensor, most: int = MOST_ROWS) -> Tensor:
    """At most `most` of the rows, a copy."""
    return rows[spread(len(rows), most).to(rows.device)]


def wide(tensor: Tensor) -> Tensor:
    """In float64; on devices that have none, in float32."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def gram(rows: Tensor) -> Tensor:
    """X Xᵀ of the rows less their mean, (rows, rows), float64.

    Cost: rows² · features multiply-adds, some features at a time.
    """
    total = wide(rows.new_zeros(len(rows), len(rows)))
    for part in rows.split(_COLUMNS, dim=1):
        centred = wide(part)
        centred = centred - centred.mean(dim=0)
        total += centred @ centred.T
    return total


def effective_rank(rows: Tensor) -> float:
    """exp(−Σ p ln p), p = σ/Σσ of the rows less their mean: how many dimensions they fill.

    Roy & Vetterli 2007. Between 1 and min(rows − 1, features); 0 where nothing varies, NaN where
    something is not finite. Cost: one eigendecomposition as large as the smaller dimension.

    >>> effective_rank(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
    2.0
    """
    if rows.shape[1] < len(rows):
        centred = wide(rows)
        centred = centred - centred.mean(dim=0)
        product = centred.T @ centred
    else:
        product = gram(rows)
    eps = torch.finfo(product.dtype).eps  # of the eigenvalues, and of the mean that was taken off
    noise = max(rows.shape) * eps * product.trace() + (16 * eps) ** 2 * wide(rows).square().sum()
    product, noise = product.cpu().double(), noise.cpu()  # eigenvalues are quicker there
    if not bool(product.isfinite().all()):
        return float("nan")
    squares = torch.linalg.eigvalsh(product)
    squares = squares[squares > noise]
    if not len(squares):
        return 0.0
    p = squares.sqrt() / squares.sqrt().sum()
    return float(torch.special.entr(p).sum().exp())
