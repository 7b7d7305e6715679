"""The critical learning rate: how long a step may be, asked of the loss by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import (
    batch_weights,
    chosen_parameters,
    fix_random_streams,
    read_once,
)
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

Model = TypeVar("Model", bound=nn.Module)

_DOUBLINGS = 20
"""Or halvings, away from where the search begins: a factor of a million either way."""
_WIDTH = 1 / 16
"""Bisection ends at 1 − low/high below this, so that the midpoint is within 3.3 %."""
_ROUNDING = 4.0
"""A loss that fell by less than this times eps · |loss| has not been seen to fall.

The float32 cross-entropy at 200 points 1e-9 apart spread over one such unit, on networks of 330 to
99,610 parameters.
"""


class Crossing(Enum):
    """What was found on the line of a step, as a sentence."""

    FOUND = "the loss falls along the update, and is above its start again within the bracket"
    NO_INCREASE = "the loss was above its start nowhere up to a million times the first guess"
    NO_DECREASE = "the loss falls at no rate down to rounding: the update does not point downhill"
    NOT_FINITE = "the loss is NaN or inf before any step: look at the batch and the weights first"


@dataclass(frozen=True)
class CriticalLearningRate:
    """The least η > 0 with L(θ − ηΔ) > L(θ), as far as forward passes tell."""

    value: float
    """η_c, the middle of the bracket. ∞ for NO_INCREASE; NaN for NO_DECREASE and NOT_FINITE."""
    bracket: tuple[float, float]
    """(low, high): at `low` the loss is not above its start, at `high` it is, or is not finite."""
    forwards: int
    """Evaluations of the loss."""
    outcome: Crossing

    @property
    def critical_sharpness(self) -> float:
        """λ_c = 2/η_c; 0 where η_c is ∞."""
        return 2.0 / self.value


def critical_learning_rate(
    loss_along: Callable[[float], Tensor | float],
    *,
    last: float | None = None,
    learning_rate: float = 1.0,
) -> CriticalLearningRate:
    """The least η > 0 at which `loss_along(η)` is above `loss_along(0)`, by forward passes alone.

    On a quadratic λ_c = 2/η_c is the `directional_sharpness` of the update, and it is what that
    estimates elsewhere without second derivatives, through any kernel. The search begins at `last`,
    the value found before, or, where that is missing, NaN or ∞, at the `learning_rate`; doubles or
    halves it, twenty times at most, until the loss rises and does not; and bisects to
    1 − low/high < 1/16, by when the midpoint is within 3.3 %. A loss that is NaN or inf counts as
    risen. Where the loss is not convex along the line, doubling may step over a narrow bump, and
    halving stops above a second one: the value is then a crossing, but not the first.

    Cost: seven forward passes where η_c lies within a factor of two of where the search begins, the
    first for L(θ); one more for each further factor of two.

    Source: Kalra et al. (2026), "A scalable measure of loss landscape curvature", arXiv 2601.16979.

    >>> found = critical_learning_rate(lambda rate: (1 - 4 * rate) ** 2, learning_rate=0.375)
    >>> found.bracket  # of ½
    (0.4921875, 0.515625)
    >>> found.forwards
    7
    """
    begin = last if last is not None and 0 < last < math.inf else learning_rate
    if not 0 < begin < math.inf:
        raise DyndiagError(
            f"learning_rate is where the search begins, a finite number above 0, but it is {begin}"
        )
    first = loss_along(0.0)
    before, forwards = float(first), 1
    if not math.isfinite(before):
        return CriticalLearningRate(math.nan, (0.0, math.inf), forwards, Crossing.NOT_FINITE)
    dtype = first.dtype if isinstance(first, Tensor) else torch.float64
    visible = _ROUNDING * torch.finfo(dtype).eps * abs(before)

    def rise(rate: float) -> float:
        nonlocal forwards
        forwards += 1
        loss = float(loss_along(rate))
        return loss - before if math.isfinite(loss) else math.inf

    low, high, lowest = 0.0, math.inf, math.inf  # `lowest`: the rise at `low`
    rate = begin
    for _ in range(1 + _DOUBLINGS):
        found = rise(rate)
        if found > 0:
            high = rate
        else:
            low, lowest = rate, found
        if low > 0 and high < math.inf:
            break
        rate = rate * 2 if low > 0 else rate / 2

    if high == math.inf:
        return CriticalLearningRate(math.inf, (low, high), forwards, Crossing.NO_INCREASE)
    # A loss that is level may be level by rounding, where the update is too short to change it.
    if low == 0 or (lowest > -visible and rise(low / 2) > -visible):
        return CriticalLearningRate(math.nan, (0.0, high), forwards, Crossing.NO_DECREASE)
    while 1 - low / high >= _WIDTH:
        middle = (low + high) / 2
        if rise(middle) > 0:
            high = middle
        else:
            low = middle
    return CriticalLearningRate((low + high) / 2, (low, high), forwards, Crossing.FOUND)


def loss_along(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    update: Tensor,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
) -> Callable[[float], Tensor]:
    """The function η ↦ L(θ − ηΔ): `loss_fn(model, ·)` over `data` on the line of an update.

    `update`: (size,), Δ over the model's trainable parameters in its own order, or over those named
    in `parameters`; the others stay. For a step that an optimizer took, momentum, preconditioner
    and decay included, it is `(before − after) / learning_rate` of the flattened weights, with the
    model back at `before`. `data`, `parameters`, `reduction` and `size` as for `hessian`.

    The function returns a number of shape (), on the device, and leaves no trace, bit for bit:
    neither in weights, buffers and modes nor in random streams. Every call sees the same random
    masks, in the model's present mode and at its present weights. Cost of a call: one forward pass
    over the data without a graph (with one only if the loss is itself made of derivatives), and one
    copy of parameters, gradients and buffers.
    """
    chosen = list(chosen_parameters(model, parameters).values())
    sizes = [p.numel() for p in chosen]
    if update.shape != (sum(sizes),):
        raise DyndiagError(
            f"update must have shape ({sum(sizes)},), one number for each of the parameters in "
            f"their order, but it has shape {tuple(update.shape)}"
        )
    parts = [
        part.detach().view(p.shape).to(p.device)
        for part, p in zip(update.split(sizes), chosen, strict=True)
    ]
    batches = read_once(model, data)
    weights = batch_weights(batches, reduction, size)

    def loss() -> Tensor:
        fix_random_streams()
        terms = [
            weight * _one_number(loss_fn(model, batch)).detach()
            for weight, batch in zip(weights, batches, strict=True)
        ]
        return torch.stack(terms).sum()

    def at(rate: float) -> Tensor:
        with no_trace(model, loss_fn=loss_fn):
            for p, part in zip(chosen, parts, strict=True):
                p.data.sub_(part, alpha=rate)  # .data: a graph that the user holds stays valid
            try:
                with torch.no_grad():
                    return loss()
            except RuntimeError:
                return loss()

    return at


def _one_number(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DyndiagError(
            f"the loss must be a tensor that holds one number, but it came as {came}: reduce it as "
            "your training loop does, for example with .mean()"
        )
    return loss.reshape(())
