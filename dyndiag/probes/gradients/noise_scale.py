"""The gradient noise scale: how large a batch has to be before noise stops to matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyndiag.batches import Batch, MicroBatches, batch_size, check_scalar_loss
from dyndiag.curvature.data import cut, number_of_examples
from dyndiag.probes.passing import norms
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState

_PARTS = 8
_MEMORY = 0.99


def unbiased(
    small: float, big: float, inverse_small: float, inverse_big: float
) -> tuple[float, float]:
    """(tr Σ, ‖G‖²) from the squared norms of gradients of small batches (their mean) and a big one.

    E‖g‖² = ‖G‖² + tr Σ / B for a batch of B independent examples; `inverse_…` are 1/B. With
    tr Σ = (|g_s|² − |g_b|²) / (1/B_s − 1/B_b) both are unbiased, also where the small batches are
    parts of the big one. Either may come out negative.

    >>> unbiased(small=5.0, big=2.0, inverse_small=1.0, inverse_big=0.25)
    (4.0, 1.0)
    """
    trace = (small - big) / (inverse_small - inverse_big)
    return trace, big - trace * inverse_big


class NoiseScale:
    """`gradients/noise_scale` B = tr Σ / ‖G‖², in examples (McCandlish et al. 2018).

    G is the expected gradient, Σ the covariance of one example's. Batches much smaller than B
    average too little, much larger ones waste examples. From the step's own batch, in eval mode, at
    the weights before the step, as the step has made them fit this batch: its micro-batches where
    it has several, else 8 equal parts of it (as many as there are examples, if fewer; what does not
    divide is left out). tr Σ and ‖G‖² by
    `unbiased`: kept for themselves as `gradients/noise_trace` and `gradients/noise_free_square`,
    which scatter so much, and go below zero near a minimum, that their running means (memory .99,
    each bias-corrected, which cancels) are divided. NaN while the mean of ‖G‖² is not above zero.

    Range: ≥ 0 but for noise. Cost: one gradient of the batch, in parts (the time of 1.5 to 2), a
    copy of the gradient in float32; 1 % of training time, at steps for which the weights before
    were kept. A loss that is no mean over examples (over tokens, of which the parts hold different
    numbers) makes parts that are only nearly of equal weight. Misleads where the examples of a
    batch are not independent (neighbouring cuts of one text), and lags: 100 samples long.
    """

    name = "NoiseScale"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=1)
        self.notices: list[str] = []
        self._trace = self._square = 0.0

    def applies(self, state: TrainState) -> bool:
        return (
            bool(state.parameters)
            and state.loss_fn is not None
            and state.batch is not None
            and state.weights_before is not None
        )

    def measure(self, state: TrainState) -> Measurements:
        assert state.batch is not None and state.weights_before is not None
        parts = _parts(state.batch)
        if len(parts) < 2:
            self.notices.append(
                "no gradient noise scale: the training batch cannot be cut into parts; it takes a "
                "batch of two examples or more, or several micro-batches a step"
            )
            return {}
        state.model.eval()
        with torch.no_grad():
            for parameter, before in zip(state.parameters, state.weights_before, strict=True):
                parameter.data.copy_(before)
        small, big = _squares(state, parts)
        # Of parts of several sizes: E‖g‖² is ‖G‖² + tr Σ times the mean of 1/size.
        inverse_small = sum(1 / part.size for part in parts) / len(parts)
        inverse_big = sum(part.share**2 / part.size for part in parts)
        trace, square = unbiased(small, big, inverse_small, inverse_big)
        if math.isfinite(trace) and math.isfinite(square):
            self._trace = _MEMORY * self._trace + (1 - _MEMORY) * trace
            self._square = _MEMORY * self._square + (1 - _MEMORY) * square
        scale = self._trace / self._square if self._square > 0 else math.nan
        return {
            "gradients/noise_scale": scale,
            "gradients/noise_trace": trace,
            "gradients/noise_free_square": square,
        }


class _Part(NamedTuple):
    batch: Batch
    size: int
    share: float


def _parts(batch: MicroBatches) -> list[_Part]:
    """The parts of a step's batch, their examples, and the share of each in its gradient."""
    if len(batch.batches) > 1:
        found = [
            _Part(part, batch_size(part), weight)
            for part, weight in zip(batch.batches, batch.weights, strict=True)
            if weight != 0 and batch_size(part) > 0
        ]
        total = sum(part.share for part in found)
        return [part._replace(share=part.share / total) for part in found]
    whole = batch.batches[0] if batch.batches else None
    examples = number_of_examples(whole) or 0
    count = min(_PARTS, examples)
    if count < 2:
        return []
    size = examples // count
    return [_Part(part, size, 1 / count) for part in cut(whole, size)[:count]]


def _squares(state: TrainState, parts: list[_Part]) -> tuple[float, float]:
    """Mean squared norm of the parts' gradients, and that of the whole's."""
    assert state.loss_fn is not None
    squares: list[Tensor] = []
    whole: list[Tensor | None] = [None] * len(state.parameters)
    for part in parts:
        loss = state.loss_fn(state.model, part.batch)
        check_scalar_loss(loss)
        gradients = torch.autograd.grad(loss.reshape(()), state.parameters, allow_unused=True)
        squares.append(_square(gradients))
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                term = part.share * dense.to(torch.promote_types(dense.dtype, torch.float32))
                so_far = whole[i]
                whole[i] = term if so_far is None else so_far.add_(term)
    return torch.stack(squares).mean().item(), _square(whole).item()


def _square(gradients: Sequence[Tensor | None]) -> Tensor:
    return norms([gradient for gradient in gradients if gradient is not None]).square().sum()
