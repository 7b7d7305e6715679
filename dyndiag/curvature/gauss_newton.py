"""The generalised Gauss–Newton matrix of a training loss as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from dyndiag.curvature.data import places
from dyndiag.curvature.engines.loss import in_full_precision, loss_over
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.outputs import (
    LossOfOutput,
    check_products,
    over_batches,
)
from dyndiag.errors import DyndiagError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class GaussNewton(Operator):
    """A Gauss–Newton matrix, with the loss and gradient that came with it for nothing."""

    loss: float
    gradient: Tensor
    """(size,), in `dtype`, on `device`."""


def gauss_newton(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
) -> GaussNewton:
    """Gauss–Newton matrix Jᵀ (∂²L/∂z²) J of `loss_fn(model, batch)`: J = ∂z/∂θ, z the output.

    The Hessian without the curvature of the model itself, Σ ∂L/∂z · ∂²z/∂θ². Positive semidefinite
    if L is convex in z. For cross-entropy from logits, squared error and binary cross-entropy from
    logits it is the true Fisher matrix, too (see `fisher`).

    z is whatever `model(...)` returns that the loss is computed from: a tensor, or several in
    tuples, mappings, dataclasses and plain objects, from one call of the model or more. A model
    may compute its loss itself if it returns what it computes it from, as Hugging Face models do
    with their `logits`.

    `data`, `reduction`, `size`: as for `hessian`, a batch or a DataLoader, exactly, whatever the
    cut. `parameters`: names of parameters or modules, or parameters; None for all that are trained.
    `micro_batch`: at most so many examples at a time, which bounds the memory of a product; the
    batches are cut along the first dimension of their tensors, and the loss must be their mean
    (or sum) over examples, which is checked on the first batch that is cut. `progress`: a bar over
    the batches of each product.

    Cost: with one batch, whose graph is kept, a product takes 1.2 to 1.7 gradients; with several,
    for graphs made anew, one at a time, 3.0 to 3.7 (MLP, CNN and GPT, one CPU thread). Building
    takes 3.4 to 4.7, with a check of J against Jᵀ on the first batch. Memory: no class × class
    block is made, but the logits, positions × classes, are there about 12 times over (3 times in a
    gradient), which `micro_batch` bounds. The vectors are float32, or float64 if a parameter is.
    Leaves no trace, and stays in the model's mode, as `hessian` does.

    Raises DyndiagError where the loss depends on the parameters by another way than z, such as a
    weight penalty, and where L is linear in z, so that its curvature is all in the model.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 14 (2002) 1723–1738.
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
    total = over_batches(in_full_precision(loss)[0])
    looks = 0

    def look(batch: LossOfOutput, weight: float) -> Tensor:
        nonlocal looks
        if not batch.curved:
            raise DyndiagError(
                "the loss is linear in what the model returns, so its Gauss–Newton matrix is zero: "
                "if the model computes the loss itself, let it return the logits as well"
            )
        if looks == 0:
            check_products(batch)
        looks += 1
        return weight * batch.gradient_and_loss()

    packed = total(look)
    return GaussNewton(
        product=lambda v: total(lambda batch, weight: gauss_newton_product(v, batch, weight)),
        size=len(packed) - 1,
        dtype=packed.dtype,
        device=packed.device,
        parts=places(loss.parameters),
        loss=packed[-1].item(),
        gradient=packed[:-1],
    )


def gauss_newton_product(v: Tensor, batch: LossOfOutput, weight: float) -> Tensor:
    """One batch's share of a product."""
    u = batch.loss_hessian_product(batch.jacobian_product(v))
    return weight * batch.transposed_product(u)
