"""The largest attention logit, read off the training's own forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dyndiag.batches import ForwardCall
from dyndiag.probes.forward import Boundary, Hook, is_compiled, undisturbed, unguarded
from dyndiag.schedule import Every
from dyndiag.state import Measurements

_TRACES = 16
"""Forwards that are followed in search of attention before the search is given up."""
_TILE = 2**22
"""Scores held at a time, at most, unless one query row is longer."""


class AttentionLogits:
    """`attention/logit_max_sampled/<module>` at every step, `attention/logit_max/<module>` at
    every 11th.

    z = scale · ⟨q, k⟩ + bias, after rotary embedding and query–key norms, over unmasked pairs
    and all heads, signed. The sampled series takes the first eighth of the sequences (at least
    one): exact for those, a lower bound for the batch. Found without changing the model, in
    `scaled_dot_product_attention`, in `nn.MultiheadAttention`, and in a softmax over scores of
    shape (…, queries, keys). Not seen: kernels of other packages, compiled modules, and what runs
    under selective checkpointing.

    Cost: the first forward is followed to find the modules; after that one product q kᵀ of the
    sequences taken, in tiles (a read, where the model holds the scores). No host sync.
    """

    def __init__(self, model: nn.Module, boundary: Boundary = unguarded) -> None:
        self._boundary, self._model = boundary, model
        self._names = {module: name or "model" for name, module in model.named_modules()}
        self._full_due = Every(11)
        self._full = False
        self._live = False
        self._found: dict[nn.Module, list[RemovableHandle]] = {}
        compiled = any(is_compiled(module) for module in model.modules())
        self._traces_left = 0 if compiled else _TRACES
        self._tracing: list[Any] = []
        self._stack: list[nn.Module] = []
        self._modes: list[_Intercept] = []
        self._waiting: list[tuple[nn.Module, _Scores]] = []
        self._seen: dict[tuple[bool, nn.Module], Tensor] = {}

    def started(self, step: int) -> None:
        self._live = True
        self._full = self._full_due.due(step)
        if self._traces_left and not self._found:
            self._trace()

    @torch.no_grad()
    def finished(self, call: ForwardCall, output: Any) -> None:
        self._live = False
        waiting, self._waiting = self._waiting, []
        if output is not None:  # else the forward has failed
            # One after another, the products find their code and its tables in the cache: that is
            # twice as fast as in the midst of the model's own work.
            with self._boundary("AttentionLogits"):
                for module, scores in waiting:
                    self._keep(module, scores)
        for handle in self._tracing:
            handle.remove()
        self._tracing = []
        while self._modes:
            self._leave_mode()
        self._stack.clear()

    def collect(self) -> Measurements:
        seen: Measurements = {
            f"attention/{'logit_max' if full else 'logit_max_sampled'}/{self._names[module]}": z
            for (full, module), z in self._seen.items()
        }
        self._seen = {}
        return seen

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handles in self._found.values():
            for handle in handles:
                handle.remove()

    def _trace(self) -> None:
        """Follow one forward with a stack of its modules, to learn which of them attend."""
        self._traces_left -= 1
        self._stack.append(self._model)  # whose own pre-hooks have run
        module_hooks = torch.nn.modules.module
        self._tracing = [
            module_hooks.register_module_forward_pre_hook(self._push),
            module_hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        self._enter_mode()

    def _push(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()

    def _enter_mode(self) -> None:
        mode = _Intercept(self._read)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def _leave_mode(self) -> None:
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._live and not self._tracing:
            self._stack.append(module)
            self._enter_mode()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module and not self._tracing:
            self._stack.pop()
            self._leave_mode()

    def _read(self, find: Callable[[], _Scores | None]) -> None:
        if not undisturbed():
            return
        with self._boundary("AttentionLogits"):
            scores = find()
            if scores is not None:
                self._measure(scores)

    def _measure(self, scores: _Scores) -> None:
        module = self._stack[-1] if self._stack else None
        if not self._live or module is None or module not in self._names:
            return
        if module not in self._found:
            self._found[module] = [
                module.register_forward_pre_hook(
                    Hook(self._enter, "AttentionLogits", self._boundary)
                ),
                module.register_forward_hook(
                    Hook(self._leave, "AttentionLogits", self._boundary), always_call=True
                ),
            ]
        if scores.stay and torch.is_grad_enabled() and not _backward_recomputes():
            self._waiting.append((module, scores))
        else:
            with torch.no_grad():
                self._keep(module, scores)

    def _keep(self, module: nn.Module, scores: _Scores) -> None:
        self._raise(False, module, scores.max(of=math.ceil(scores.sequences / 8)))
        if self._full:
            self._raise(True, module, scores.max(of=scores.sequences))

    def _raise(self, full: bool, module: nn.Module, highest: Tensor) -> None:
        before = self._seen.get((full, module))
        self._seen[full, module] = highest if before is None else torch.maximum(before, highest)


def _backward_recomputes() -> bool:
    """Whether checkpointing is at work, so that a forward's tensors do not wait for the backward
    pass: keeping them would cost the memory that it saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Scores:
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


class _Intercept(TorchFunctionMode):
    """Shows attention's scores to `read`, and lets every call through unchanged."""

    def __init__(self, read: Callable[[Callable[[], _Scores | None]], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        scores = None if torch.compiler.is_compiling() else _ATTENTION.get(func)
        if scores is not None:
            self._read(lambda: scores(*args, **kwargs))
        return func(*args, **kwargs)


def _of_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Scores | None:
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
    return _Scores(query.shape[0], tiles, stay=saved)


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
) -> _Scores | None:
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

    return _Scores(query.shape[1], tiles)


def _of_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> _Scores | None:
    last = dim is not None and (dim == -1 or dim == input.dim() - 1)
    square = input.dim() == 3 and input.shape[-1] == input.shape[-2]
    if not (last and (input.dim() >= 4 or square) and input.is_floating_point()):
        return None
    scores = input.detach()
    return _Scores(scores.shape[0], lambda count: (scores[:count],))


_ATTENTION: dict[Callable[..., Any], Callable[..., _Scores | None]] = {
    F.scaled_dot_product_attention: _of_dot_product,
    F.multi_head_attention_forward: _of_multi_head,
    F.softmax: _of_softmax,
    torch.softmax: _of_softmax,
    Tensor.softmax: _of_softmax,
}
