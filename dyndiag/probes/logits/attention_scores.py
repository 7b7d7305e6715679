"""Attention's scores, found in the calls that make them; only blocks of them are ever made."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scores:
    """Attention scores of some sequences, (sequences, …, heads, queries, keys)."""

    causal = False
    """Whether no query sees a later key."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.sequences, self.queries, self.keys = shape[0], *shape[-2:]
        self.heads = math.prod(shape[1:-2])
        """Of a sequence, whatever other dimensions there are."""
        self._dtype = dtype

    @property
    def lowest(self) -> float:
        """Scores below it are masked: models mask with the dtype's lowest number, or with −inf."""
        return torch.finfo(self._dtype).min / 2

    def block(self, sequences: slice, queries: slice, keys: slice) -> Tensor:
        """(…, heads, queries, keys), masked ones at −inf or below `lowest`; not to be changed."""
        raise NotImplementedError


class Given(Scores):
    """Scores that the model itself holds."""

    def __init__(self, scores: Tensor) -> None:
        scores = scores.detach()
        self._scores = scores.unsqueeze(1) if scores.dim() == 3 else scores
        super().__init__(self._scores.shape, scores.dtype, scores.device)

    def block(self, sequences: slice, queries: slice, keys: slice) -> Tensor:
        return _wide(self._scores[sequences][..., queries, keys])


class DotProduct(Scores):
    """factor · ⟨query, key⟩, masked: queries (sequences, …, heads, queries, width)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        factor: float,
        *,
        causal: bool = False,
        masks: tuple[tuple[Tensor, bool], ...] = (),
    ) -> None:
        """`masks`: floating ones are added; of others, whether True hides (else it shows)."""
        self._shape = query.shape[:-1] + key.shape[-2:-1]
        dtype = next((mask.dtype for mask, _ in masks if mask.is_floating_point()), query.dtype)
        super().__init__(self._shape, dtype, query.device)
        if key.shape[0] != query.shape[0]:
            key = key.expand(*query.shape[:-3], *key.shape[-3:])
        self.query, self.key, self.factor = query, key, factor
        self.causal, self.masks = causal, masks

    def block(self, sequences: slice, queries: slice, keys: slice) -> Tensor:
        q, k = self._heads(sequences)
        if queries.stop - queries.start < self.queries:
            q = q[..., queries, :]
        if keys.stop - keys.start < self.keys:
            k = k[..., keys, :]
        z = _product(q, k, self.factor)
        if self.causal:
            _hide_later(z, queries.start - keys.start)
        for mask, hides in self.masks:
            part = mask.detach().expand(self._shape)[sequences][..., queries, keys]
            if part.is_floating_point():
                z = z + part
            else:
                z = torch.where(part, -torch.inf, z) if hides else torch.where(part, z, -torch.inf)
        return z

    def _heads(self, sequences: slice) -> tuple[Tensor, Tensor]:
        return self.query[sequences], self.key[sequences]


class Projected(DotProduct):
    """Scores of `nn.MultiheadAttention`, whose inputs come as (length, sequences, width) and are
    projected once more, a few sequences at a time."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        heads: int,
        more_keys: list[Tensor],
        masks: tuple[tuple[Tensor, bool], ...],
    ) -> None:
        """`more_keys`: (1, 1, width) each, seen by all queries."""
        width = weights[0].shape[0]
        q, k = (x.transpose(0, 1)[:, None, :, :1].expand(-1, heads, -1, -1) for x in inputs)
        k = k[..., :1, :].expand(-1, -1, k.shape[-2] + len(more_keys), -1)  # for its shape alone
        super().__init__(q, k, 1 / math.sqrt(width // heads), masks=masks)
        self._inputs, self._weights, self._biases = inputs, weights, biases
        self._more_keys = more_keys
        self._last: tuple[slice, tuple[Tensor, Tensor]] | None = None

    def _heads(self, sequences: slice) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] != sequences:
            found: list[Tensor] = []
            for x, weight, bias in zip(self._inputs, self._weights, self._biases, strict=True):
                part = x[:, sequences].detach()
                y = F.linear(part, weight.detach(), None if bias is None else bias.detach())
                if len(found) == 1:
                    more = [key.detach().expand(1, *y.shape[1:]) for key in self._more_keys]
                    y = torch.cat([y, *(key.to(y.dtype) for key in more)])
                found.append(y.transpose(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2))
            self._last = sequences, (found[0], found[1])
        return self._last[1]


def stacked(scores: list[DotProduct], of: int) -> DotProduct:
    """The first `of` sequences of each, one after another; all of one shape, and unmasked."""
    one = scores[0]
    q, k = (torch.cat([getattr(s, x)[:of] for s in scores]).detach() for x in ("query", "key"))
    return DotProduct(q, k, one.factor, causal=one.causal)


def _plain(x: Tensor) -> bool:
    """Whether it is an ordinary tensor of numbers: not nested, not spread over processes."""
    ordinary = type(x) in (Tensor, nn.Parameter) and not x.is_nested
    return ordinary and x.is_floating_point() and x.numel() > 0


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    ):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _product(q: Tensor, k: Tensor, factor: float) -> Tensor:
    """factor · q kᵀ; keys for fewer heads than queries are shared among neighbours."""
    groups = q.shape[-3] // k.shape[-3]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=-3)
    q, k = _wide(q.detach()), _wide(k.detach()).transpose(-2, -1)
    with _without_autocast(q.device):
        if q.dim() > 4 or q.shape[0] > 8 or q.device.type != "cpu":
            return torch.matmul(q * factor, k)
        # A few sequences, each alone: heads that lie apart in memory need no copy then.
        z = q.new_empty(*q.shape[:-1], k.shape[-1])
        for of_q, of_k, out in zip(q.unbind(), k.unbind(), z.unbind(), strict=True):
            torch.baddbmm(out, of_q, of_k, beta=0, alpha=factor, out=out)
        return z


def _hide_later(z: Tensor, offset: int) -> None:
    """Put −inf where the key comes after the query; the first query is `offset` after the first
    key."""
    z = z[..., max(0, offset) :]  # all queries see the keys before
    if z.shape[-1] > 0:
        offset = min(0, offset)
        # Twice over a block in cache is many times faster than a masked fill; not added alone,
        # because infinite keys that nobody sees would leave NaN.
        z.tril_(offset).add_(_later(*z.shape[-2:], offset, z.dtype, z.device))


@lru_cache(maxsize=8)
def _later(
    queries: int, keys: int, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(offset + 1)
    zeros = torch.zeros(queries, keys, dtype=dtype, device=device)
    return zeros.masked_fill_(hidden, -torch.inf)


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
    if not (_plain(query) and _plain(key)) or query.dim() < 3:
        return None
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    if query.dim() == 3:  # without heads
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
    masks = () if attn_mask is None else ((attn_mask, False),)
    return DotProduct(query, key, factor, causal=is_causal, masks=masks)


def _of_multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    **__: Any,
) -> Scores | None:
    if query.dim() == 2:  # one sequence
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if not (_plain(query) and _plain(key)) or query.dim() != 3 or static_k is not None:
        return None
    width = query.shape[-1]
    if use_separate_proj_weight:
        q_weight, k_weight = q_proj_weight, k_proj_weight
    else:
        assert in_proj_weight is not None
        q_weight, k_weight = in_proj_weight[:width], in_proj_weight[width : 2 * width]
    assert q_weight is not None and k_weight is not None
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if in_proj_bias is not None:
        biases = (in_proj_bias[:width], in_proj_bias[width : 2 * width])
    more_keys = [] if bias_k is None else [bias_k]
    if add_zero_attn:
        more_keys.append(k_weight.new_zeros(1, 1, width))
    masks: tuple[tuple[Tensor, bool], ...] = ()
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, num_heads))
        masks += ((F.pad(attn_mask, (0, len(more_keys))), True),)
    if key_padding_mask is not None:
        masks += ((F.pad(key_padding_mask, (0, len(more_keys)))[:, None, None], True),)
    return Projected((query, key), (q_weight, k_weight), biases, num_heads, more_keys, masks)


def _of_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Scores | None:
    last = dim is not None and (dim == -1 or dim == input.dim() - 1)
    square = input.dim() == 3 and input.shape[-1] == input.shape[-2]
    if not (last and (input.dim() >= 4 or square) and _plain(input)):
        return None
    return Given(input)


FINDERS: dict[Callable[..., Any], Callable[..., Scores | None]] = {
    F.scaled_dot_product_attention: _of_dot_product,
    F.multi_head_attention_forward: _of_multi_head,
    F.softmax: _of_softmax,
    torch.softmax: _of_softmax,
    Tensor.softmax: _of_softmax,
}
"""Which function makes, or is given, the scores; and what finds them in its arguments."""


def saved_for_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether autograd keeps what the scores are made from, unchanged, for the backward pass."""
    if func is not F.scaled_dot_product_attention or len(args) not in (2, 3):
        return False
    return args[0].requires_grad and args[1].requires_grad and kwargs.get("attn_mask") is None
