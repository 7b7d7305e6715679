"""The Hessian of a training loss as an operator, by double backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import batch_weights, fix_random_streams, read_once
from dyndiag.curvature.operator import Operator
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LossHessian(Operator):
    """The Hessian of a loss, with the loss and gradient that came with it for nothing."""

    loss: float
    gradient: Tensor
    """(size,), in `dtype`, on `device`: where batch sharpness gᵀHg/gᵀg finds its g."""


def loss_hessian(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> LossHessian:
    """Hessian of `loss()` over those of `parameters` that require gradients, in their order.

    Calls `loss` once and keeps the graph of its gradient, so that a product costs one backward pass
    through it (1.1 to 2.4 gradients) and always sees the same random masks. A parameter that the
    loss does not use has zero rows. Vectors are float32, or float64 if a parameter is; weights of
    16 bits keep their own precision inside the product, which then limits what can converge.

    What the call of `loss` changes (buffers, random streams) stays changed: put `guard.no_trace`
    around it where that matters. The graph belongs to the weights it was built at: build it again
    after a step, an in-place change raises.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise DyndiagError(
            "none of the parameters requires a gradient, so there is no Hessian: unfreeze the "
            "parameters that you train before measuring"
        )
    with _plain_backward(parameters):
        value = _one_number(loss())
        gradient = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    if all(part is None for part in gradient):
        raise DyndiagError(
            "the loss depends on none of the trainable parameters: compute it with the model "
            "whose Hessian you ask for"
        )
    built_at = _versions(parameters)
    sizes = [p.numel() for p in parameters]
    dtype = _vector_dtype(parameters)
    curved = [i for i, part in enumerate(gradient) if part is not None and part.requires_grad]
    outputs = [gradient[i] for i in curved]

    def product(v: Tensor) -> Tensor:
        if _versions(parameters) != built_at:
            raise DyndiagError(
                "the parameters have changed since this Hessian was built: build it again at the "
                "new weights"
            )
        if not outputs:  # the loss is linear in every parameter
            return torch.zeros_like(v)
        parts = torch.split(v, sizes)
        directions = [parts[i].view(parameters[i].shape).to(parameters[i]) for i in curved]
        with _plain_backward(parameters):
            images = torch.autograd.grad(
                outputs, parameters, directions, retain_graph=True, allow_unused=True
            )
        return _flat(images, parameters, dtype)

    return LossHessian(
        product=product,
        size=sum(sizes),
        dtype=dtype,
        device=parameters[0].device,
        loss=value.item(),
        gradient=_flat(gradient, parameters, dtype),
    )


def hessian(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
) -> LossHessian:
    """Hessian of `loss_fn(model, batch)` over the model's trainable parameters, in its own order.

    `data`: one batch, or a torch `DataLoader`, which alone means several. Each batch weighs by its
    number of examples, the length of its first tensor or `size(batch)`, so that any cut of the data
    gives the same operator; with `reduction="sum"` the losses add up. The loader is read once, and
    its batches are kept: it may shuffle.

    The model stays in its mode. In train mode all products see the same dropout masks, drawn from a
    fixed seed, and BatchNorm couples the examples of a batch. Neither building nor multiplying
    leaves a trace in model, gradients or random streams.

    Cost: a product takes one backward pass through a kept graph (1.1 to 2.4 gradients), or, with
    several batches, a forward and two backward passes through each, at the weights and in the mode
    of the moment.
    """
    parameters = list(model.parameters())
    batches = read_once(model, data)
    weights = batch_weights(batches, reduction, size)

    def part(batch: Any) -> LossHessian:
        return loss_hessian(partial(loss_fn, model, batch), parameters)

    def total(of: Callable[[LossHessian], Tensor]) -> Tensor:
        """Σ weight · of(part), with one graph at a time."""
        with no_trace(model):
            fix_random_streams()
            terms = (w * of(part(batch)) for w, batch in zip(weights, batches, strict=True))
            return reduce(torch.add, terms)

    if len(batches) == 1:
        with no_trace(model):
            fix_random_streams()
            whole = part(batches[0])
        if not any(module.training for module in model.modules()):
            return whole

        def guarded(v: Tensor) -> Tensor:
            # A checkpointed layer runs its forward pass again in every backward pass, which in
            # train mode may count in its buffers.
            with no_trace(model):
                return whole.product(v)

        return replace(whole, product=guarded)

    packed = total(lambda h: torch.cat((h.gradient, h.gradient.new_tensor([h.loss]))))
    return LossHessian(
        product=lambda v: total(lambda h: h.product(v)),
        size=len(packed) - 1,
        dtype=packed.dtype,
        device=packed.device,
        loss=packed[-1].item(),
        gradient=packed[:-1],
    )


def _one_number(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise DyndiagError(
            f"the loss must be a tensor that holds one number, but it is a {type(loss).__name__}: "
            "return it before .item(), or the .loss of a model's output"
        )
    if loss.numel() != 1:
        raise DyndiagError(
            f"the loss must be one number, but it has shape {tuple(loss.shape)}: "
            "reduce it as your training loop does, for example with .mean()"
        )
    if not loss.requires_grad:
        raise DyndiagError(
            "the loss has no graph back to the parameters: compute it from the model's output, "
            "without no_grad() or .detach()"
        )
    if not math.isfinite(loss.item()):
        raise DyndiagError(
            f"the loss must be finite to have curvature, but it is {loss.item()}: look at the "
            "batch and the weights first"
        )
    return loss.reshape(())


def _versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Changes with every in-place change of a parameter, and when its storage is replaced."""
    return [(p._version, p.data_ptr()) for p in parameters]


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def _flat(
    parts: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """One vector of all parts, in the parameters' order; zeros where a part is missing."""
    device = parameters[0].device
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=dtype, device=device)
            if part is None
            else part.detach().to_dense().reshape(-1).to(device=device, dtype=dtype)
            for part, p in zip(parts, parameters, strict=True)
        ]
    )


@contextmanager
def _plain_backward(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Derivatives as they are: gradients on, no autocast, and the user's tensor hooks silent."""
    hooks = [table for p in parameters if (table := p._backward_hooks)]
    before = [dict(table) for table in hooks]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on, too
        for device in {"cpu", parameters[0].device.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for table in hooks:
            table.clear()
        try:
            yield
        finally:
            for table, entries in zip(hooks, before, strict=True):
                table.update(entries)
