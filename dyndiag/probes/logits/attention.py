"""Attention logits and entropies, read off the training's own forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import ForwardCall
from dyndiag.probes.forward import Boundary, unguarded
from dyndiag.probes.logits.attention_calls import AttentionCalls
from dyndiag.probes.logits.attention_scores import (
    FINDERS,
    DotProduct,
    Scores,
    saved_for_backward,
    stacked,
)
from dyndiag.probes.logits.attention_statistics import HeadStatistics, block_size, entropies, maxima
from dyndiag.probes.modules import MOST_PARTS
from dyndiag.schedule import Every, WithinShare
from dyndiag.state import Measurements


class AttentionLogits:
    """How large attention's logits are, and how spread out what it looks at.

    z = factor · ⟨q, k⟩ + bias, after rotary embedding, query–key norms and soft caps, over
    unmasked pairs, in nats, signed; in the dtype of q and k, in float32 for half precision.

    - `attention/logit_max_sampled/<module>`, at every step: the largest z over all heads of the
      first eighth of the sequences (at least one). Exact for those, a lower bound for the batch.
    - At every 11th step `attention/logit_max/<module>`, the largest over all heads and sequences,
      and `attention/head_logit_max/<module>`, (heads,), each head's. Training diverges above
      about 1e4 (Wortsman et al. 2023, arXiv 2309.14322).
    - At these also `attention/entropy/<module>`, in [0, ln(number of unmasked keys)], and
      `attention/head_entropy/<module>`, (heads,): the mean over the rows (queries) of the first
      eighth of −Σ p ln p, p = softmax(z); near 0 a head looks at one key only (Zhai et al. 2023,
      arXiv 2303.06296). Rows without an unmasked key are left out; a batch of only such rows has
      −∞ and NaN.

    Of several micro-batches and calls of a module: the maximum, and the mean over all rows. More
    than 128 modules come in one array per quantity, in the order in which they run, without heads.

    Found without changing the model, in `scaled_dot_product_attention`, in
    `nn.MultiheadAttention`, and in a softmax over scores of shape (…, queries, keys). Not seen:
    kernels of other packages, compiled modules, and what runs under selective checkpointing.

    When: as said in the first 500 steps. From there on the eighth at every step as long as that
    takes at most 0.02 % of the time, else at odd intervals; the rest at every 11th step, or at odd
    multiples, within 0.01 %. (Or in 0.25 s each, if that is more, spread over the logarithm of
    time.) What counts is the time of the training's thread: on an accelerator that of the launches.

    Cost of a reading: one product q kᵀ of the sequences taken (a read, where the model holds the
    scores; for `nn.MultiheadAttention` the projections once more), and an exponential for each
    score of the eighth at every 11th; never more than a block of scores in memory. No host sync.

    Misleads where a model masks with moderate numbers such as −10,000, which count as scores, and
    where it softmaxes something of four dimensions that is no attention.
    """

    def __init__(self, model: nn.Module, boundary: Boundary = unguarded) -> None:
        self._boundary = boundary
        self._calls = AttentionCalls(model, self._read, boundary)
        self._eighth_due = WithinShare(0.0002)
        self._all_due = WithinShare(0.0001, Every(11))
        self._eighth = self._all = self._live = self._begun = False
        self._waiting: list[_Call] = []
        self._largest: dict[nn.Module, Tensor] = {}
        self._heads: dict[nn.Module, HeadStatistics] = {}

    def started(self, step: int, outermost: nn.Module) -> None:
        began = time.perf_counter()
        if not self._begun:  # the step's first forward
            self._begun = True
            self._eighth = self._eighth_due.due(step, began)
            self._all = self._all_due.due(step, began)
        self._live = self._eighth or self._all
        if self._live:
            self._calls.follow(outermost, whole=self._all)
            self._calls.seconds += time.perf_counter() - began

    def finished(self, call: ForwardCall, output: Any) -> None:
        if not self._live:
            return
        self._live = False
        began = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        if output is not None:  # else the forward has failed
            with self._boundary("AttentionLogits"), torch.no_grad():
                self._keep(waiting)
        self._calls.stop()
        seconds = self._calls.seconds + time.perf_counter() - began
        self._calls.seconds = 0.0
        (self._all_due if self._all else self._eighth_due).paid(seconds)

    def collect(self) -> Measurements:
        self._begun = False
        by_module: dict[str, dict[nn.Module, Tensor]] = {"logit_max_sampled": self._largest}
        for module, heads in self._heads.items():
            for name, value in heads.series().items():
                by_module.setdefault(name, {})[module] = value
        seen: Measurements = {}
        for name, values in by_module.items():
            if len(values) <= MOST_PARTS:
                for module, value in values.items():
                    seen[f"attention/{name}/{self._calls.names[module]}"] = value
            elif not name.startswith("head_"):
                seen[f"attention/{name}"] = _together(list(values.values()))
        self._largest, self._heads = {}, {}
        return seen

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._calls.stop()

    def _read(
        self, module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        call = module, func, args, kwargs
        saved = saved_for_backward(func, args, kwargs)
        if saved and torch.is_grad_enabled() and not _backward_recomputes():
            # Until the forward's end: one after another, the products find their code and its
            # tables in the cache, which on a CPU takes a third less.
            self._waiting.append(call)
        else:
            with torch.no_grad():
                self._keep([call])

    def _keep(self, calls: list[_Call]) -> None:
        found: list[tuple[nn.Module, Scores]] = []
        for module, func, args, kwargs in calls:
            scores = FINDERS[func](*args, **kwargs)
            if scores is not None:
                self._calls.attends(module)
                found.append((module, scores))
        if not self._all:
            for modules, largest in _largest(found):
                self._raise(modules, largest)
            return
        for module, scores in found:
            of = _eighth(scores)
            highest = maxima(scores, scores.sequences)
            if self._eighth:
                sampled = highest[: len(highest) // scores.sequences * of]
                self._raise([module], [sampled.amax()])
            heads = HeadStatistics(highest.amax(dim=0), *entropies(scores, of))
            before = self._heads.get(module)
            self._heads[module] = heads if before is None else before.and_also(heads)

    def _raise(self, modules: Iterable[nn.Module], largest: Iterable[Tensor]) -> None:
        for module, value in zip(modules, largest, strict=True):
            before = self._largest.get(module)
            self._largest[module] = value if before is None else torch.maximum(before, value)


_Call = tuple[nn.Module, Any, tuple[Any, ...], dict[str, Any]]


def _eighth(scores: Scores) -> int:
    return math.ceil(scores.sequences / 8)


def _largest(
    found: list[tuple[nn.Module, Scores]],
) -> Iterable[tuple[list[nn.Module], Iterable[Tensor]]]:
    """Largest scores of the first eighth; on accelerators those of equal layers in one product,
    where launches cost more than the copy that it takes."""
    alike: dict[Any, list[tuple[nn.Module, DotProduct]]] = {}
    for module, scores in found:
        of, size = _eighth(scores), scores.heads * scores.queries * scores.keys
        if (
            _stacks(scores.device)
            and type(scores) is DotProduct
            and not scores.masks
            and of * size * len(found) <= block_size(scores.device)
        ):
            q, k = scores.query, scores.key
            kind = (q.shape, k.shape, q.dtype, q.device, scores.factor, scores.causal)
            alike.setdefault(kind, []).append((module, scores))
        else:
            yield [module], [maxima(scores, of).amax()]
    for group in alike.values():
        modules = [module for module, _ in group]
        together = stacked([scores for _, scores in group], _eighth(group[0][1]))
        highest = maxima(together, together.sequences)
        yield modules, highest.view(len(group), -1).amax(dim=1).unbind()


def _stacks(device: torch.device) -> bool:
    return device.type != "cpu"


def _backward_recomputes() -> bool:
    """Whether checkpointing is at work, so that a forward's tensors do not wait for the backward
    pass: keeping them would cost the memory that it saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _together(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values])
