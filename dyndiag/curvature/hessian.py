"""The Hessian of a training loss as an operator, by an engine that is chosen and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from dyndiag.curvature.data import places
from dyndiag.curvature.engines.cached import double_backward
from dyndiag.curvature.engines.choice import choose
from dyndiag.curvature.engines.engine import Check, Engine
from dyndiag.curvature.engines.loss import in_full_precision, loss_over
from dyndiag.curvature.operator import Operator
from dyndiag.errors import DyndiagError

__all__ = ["Check", "Engine", "LossHessian", "hessian", "loss_hessian"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LossHessian(Operator):
    """The Hessian of a loss, with the loss and gradient that came with it for nothing."""

    loss: float
    gradient: Tensor
    """(size,), in `dtype`, on `device`: where batch sharpness gᵀHg/gᵀg finds its g."""
    engine: Engine
    """How products are computed, why so, and what a check by finite differences found."""


def loss_hessian(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> LossHessian:
    """Hessian of `loss()` over those of `parameters` that require gradients, in their order.

    Calls `loss` once and keeps the graph of its gradient, so that a product costs one backward pass
    through it (1.6 to 2.4 gradients) and always sees the same random masks. A parameter that the
    loss does not use has zero rows. Vectors are float32, or float64 if a parameter is; weights of
    16 bits keep their own precision inside the product, which then limits what can converge.

    What the call of `loss` changes (buffers, random streams) stays changed: put `guard.no_trace`
    around it where that matters. The graph belongs to the weights it was built at: build it again
    after a step, an in-place change raises. Nothing is checked: `hessian` does that.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise DyndiagError(
            "none of the parameters requires a gradient, so there is no Hessian: unfreeze the "
            "parameters that you train before measuring"
        )
    found = double_backward(loss, parameters)
    return LossHessian(
        product=found.product,
        size=len(found.gradient),
        dtype=found.gradient.dtype,
        device=found.gradient.device,
        loss=found.loss.item(),
        gradient=found.gradient,
        engine=Engine("cached", "the graph of one gradient, kept"),
    )


def hessian(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    engine: str = "auto",
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
) -> LossHessian:
    """Hessian of `loss_fn(model, batch)` over the model's trainable parameters, in its own order.

    `data`: one batch, or a torch `DataLoader`, which alone means several. Each batch weighs by its
    number of examples, the length of its first tensor or `size(batch)`, so that any cut of the data
    gives the same operator; with `reduction="sum"` the losses add up. The loader is read once, and
    its batches are kept: it may shuffle. `micro_batch` cuts each batch into so many examples at a
    time; the first cut batch's loss is compared with the whole one's, and one that is no mean over
    examples raises. `parameters`: names of parameters or modules, or parameters
    themselves. `progress` shows the batches of each pass.

    The model stays in its mode. In train mode all products see the same dropout masks, drawn from a
    fixed seed, and BatchNorm couples the examples of a batch. Neither building nor multiplying
    leaves a trace in model, gradients or random streams. Changed weights or modes make it raise.
    What an embedding looks up of its padding row is a constant, as in training. One with
    `max_norm`, which changes its weights in each forward pass, is refused.

    Products are in float32, or float64 if a parameter is: autocast in `loss_fn` is off, and where
    the model has weights or buffers of 16 bits, model and floating point inputs run as float32
    copies (4 more bytes a weight), so that the Hessian is that of the loss without rounding, at the
    rounded weights. Where that cannot run, the model's own precision is kept, and the engine's
    reason says so.

    `engine`, and what a product costs in gradients:
    - "cached": double backward through one kept graph; 1.6 to 2.4.
    - "rebuilt": the same, with a graph made anew for each batch; 2.7 to 4.2. Micro-batches of a
      sixth of a training batch need less memory than a training step.
    - "forward_over_reverse": forward derivatives of the backward pass; 3.6 to 4.6.
    - "linearised": 1.7 to 2.4 after 25 to 180 gradients; for hundreds of products.
    - "finite_differences": 2 to 2.7 after 13 or 26; not exact, with the error in `.engine.check`:
      some 1e-4 for a smooth loss in float32, and up to tens of percent across kinks there.
    - "auto": cached for one batch, rebuilt for several; where a kernel has no second derivative, or
      a wrong one, forward over reverse, and else finite differences.
    Which one, why, and the check are in `.engine`. The check compares a product with finite
    differences along a random direction, once for each model, loss function and engine, on the
    first 16 examples where the loss can be had of them: one product and 4 gradients of these, 4 or
    5 more where these do not settle it. An engine that was asked for
    warns where it fails the check.
    """
    loss = loss_over(
        model,
        loss_fn,
        data,
        parameters,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
        progress=progress,
    )
    loss, precision = in_full_precision(loss)
    found, used = choose(loss, engine)
    return LossHessian(
        product=found.product,
        size=len(found.gradient),
        dtype=found.gradient.dtype,
        device=found.gradient.device,
        parts=places(loss.parameters),
        loss=found.loss.item(),
        gradient=found.gradient,
        engine=replace(used, reason=used.reason + precision),
    )
