"""Attention's scores, found in the calls that make them: at hand already, or to be multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**22
"""Scores held at a time, at most, unless one query row is longer."""


class Scores:
    """Attention scores, given or still to be multiplied, of a number of sequences."""

    def __init__(
        self,
        sequences: int,
        tiles: Callable[[int], Iterable[Tensor]],
        *,
        stay: bool = False,
    ) -> None:
        """`stay`: what they are made from is kept, unchanged, for the backward pass."""
        self.sequences = sequences
        self.stay = stay
        self._tiles = tiles

    def max(self, of: int) -> Tensor:
        """Largest unmasked score of the first `of` sequences, 0-d."""
        highest = [tile.amax() for tile in self._tiles(of)]
        return highest[0] if len(highest) == 1 else torch.stack(highest).amax()


def _of_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Scores | None:
    if query.dim() < 3 or query.is_nested:
        return None
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    groups = query.shape[-3] // key.shape[-3] if query.dim() > 3 else 1

    def tiles(count: int) -> Iterable[Tensor]:
        # Of a few sequences, each alone: strided heads need no copy then.
        taken = range(count) if count <= 2 else (slice(count),)
        for sequences in taken:
            q, k = query[sequences], key[sequences]
            if groups > 1:  # grouped-query attention
                k = k.repeat_interleave(groups, dim=-3)
            leading = q.shape[:-2]
            if len(leading) != 1:
                q, k = q.reshape(-1, *q.shape[-2:]), k.reshape(-1, *k.shape[-2:])
            k = k.transpose(-2, -1)
            length = q.shape[-2]
            rows = max(1, _TILE // max(1, q.shape[0] * k.shape[-1]))
            for first in range(0, length, rows):
                part = q if rows >= length else q[:, first : first + rows]
                bias = _bias(first, part.shape[-2], k.shape[-1], q.dtype, q.device, is_causal)
                # One call for product, scale and mask: on small batches calls are what costs.
                z = torch.baddbmm(bias, part, k, alpha=factor)
                yield (
                    z
                    if attn_mask is None
                    else _masked(z.unflatten(0, leading), attn_mask, first, sequences)
                )

    saved = query.requires_grad and key.requires_grad and attn_mask is None
    return Scores(query.shape[0], tiles, stay=saved)


@lru_cache(maxsize=8)
def _bias(
    first: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, causal: bool
) -> Tensor:
    """−inf where the key comes after the query, else 0; shape (rows, columns), or () of 0."""
    if not causal:
        return torch.zeros((), dtype=dtype, device=device)
    row = torch.arange(first, first + rows, device=device)[:, None]
    hidden = torch.arange(columns, device=device) > row
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)


def _masked(z: Tensor, mask: Tensor, first: int, sequences: int | slice) -> Tensor:
    """Scores of some sequences, with what the mask of the whole batch hides at −inf."""
    whole = z.dim() + isinstance(sequences, int)
    if mask.dim() == whole:
        mask = mask[sequences] if mask.shape[0] > 1 else mask[0] if z.dim() < whole else mask
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., first : first + z.shape[-2], :]
    return z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask.detach()


def _of_multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    bias_k: Tensor | None = None,
    **__: Any,
) -> Scores | None:
    """Scores of `nn.MultiheadAttention`, whose inputs come as (length, batch, width)."""
    if query.dim() != 3 or bias_k is not None:
        return None
    width = query.shape[-1]
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = (in_proj_weight[:width], in_proj_weight[width : 2 * width])
    biases = (
        (None, None)
        if in_proj_bias is None
        else (in_proj_bias[:width], in_proj_bias[width : 2 * width])
    )

    def heads(x: Tensor, which: int, count: int) -> Tensor:
        weight, bias = weights[which], biases[which]
        assert weight is not None
        offset = None if bias is None else bias.detach()
        y = F.linear(x[:, :count].detach(), weight.detach(), offset)
        return y.transpose(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def tiles(count: int) -> Iterable[Tensor]:
        q, k = heads(query, 0, count), heads(key, 1, count)
        mask = attn_mask
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, num_heads))[:count]
        hidden = None if key_padding_mask is None else key_padding_mask[:count, None, None, :]
        rows = max(1, _TILE // max(1, q[..., 0, 0].numel() * k.shape[-2]))
        for first in range(0, q.shape[-2], rows):
            z = q[..., first : first + rows, :] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            for hides in (None if mask is None else mask[..., first : first + rows, :], hidden):
                if hides is not None:  # here, unlike in dot-product attention, True hides
                    hide = hides.dtype == torch.bool
                    z = z.masked_fill(hides, -torch.inf) if hide else z + hides.detach()
            if is_causal and mask is None:
                z = z + _bias(first, z.shape[-2], z.shape[-1], z.dtype, z.device, True)
            yield z

    return Scores(query.shape[1], tiles)


def _of_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Scores | None:
    last = dim is not None and (dim == -1 or dim == input.dim() - 1)
    square = input.dim() == 3 and input.shape[-1] == input.shape[-2]
    if not (last and (input.dim() >= 4 or square) and input.is_floating_point()):
        return None
    scores = input.detach()
    return Scores(scores.shape[0], lambda count: (scores[:count],))


FINDERS: dict[Callable[..., Any], Callable[..., Scores | None]] = {
    F.scaled_dot_product_attention: _of_dot_product,
    F.multi_head_attention_forward: _of_multi_head,
    F.softmax: _of_softmax,
    torch.softmax: _of_softmax,
    Tensor.softmax: _of_softmax,
}
"""Which function makes, or is given, the scores; and what finds them in its arguments."""
