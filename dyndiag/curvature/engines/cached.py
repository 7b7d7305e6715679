"""Double backward through the graph of a gradient, which is built once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce

import torch
from torch import Tensor

from dyndiag.curvature.engines.engine import Derivatives
from dyndiag.curvature.engines.loss import (
    Loss,
    at_least_one,
    finite,
    flat,
    one_number,
    vector_dtype,
    versions,
)
from dyndiag.curvature.engines.surroundings import random_streams
from dyndiag.errors import DyndiagError


def double_backward(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Derivatives:
    """Calls `loss` once. A product is one backward pass through the graph of the gradient."""
    with plain_backward(parameters):
        value, gradient = _with_graph(loss, parameters)
    built_at = versions(parameters)
    backward = _Backward(gradient, parameters)

    def product(v: Tensor) -> Tensor:
        if versions(parameters) != built_at:
            raise DyndiagError(
                "the parameters have changed since this Hessian was built: build it again at the "
                "new weights"
            )
        with plain_backward(parameters):
            return backward(v, keep_graph=True)

    return Derivatives(value.detach(), flat(gradient, parameters, backward.dtype), product)


def one_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor], v: Tensor) -> Tensor:
    """The same, with a graph that is let go while it is used."""
    with plain_backward(parameters):
        gradient = _with_graph(loss, parameters)[1]
        return _Backward(gradient, parameters)(v, keep_graph=False)


_Parts = Sequence[Tensor | None]


def _with_graph(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, _Parts]:
    value = finite(one_number(loss()))
    gradient = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    at_least_one(gradient)
    return value, gradient


class _Backward:
    """The backward pass through the graph of a gradient."""

    def __init__(self, gradient: _Parts, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.dtype = parameters, vector_dtype(parameters)
        self.sizes = [p.numel() for p in parameters]
        curved = [
            (i, part, parameters[i])
            for i, part in enumerate(gradient)
            if part is not None and part.requires_grad
        ]
        self.outputs = [part for _, part, _ in curved]
        self.places = [(i, p.shape, p.dtype, p.device) for i, _, p in curved]

    def __call__(self, v: Tensor, *, keep_graph: bool) -> Tensor:
        if not self.outputs:  # the loss is linear in every parameter
            return torch.zeros_like(v)
        parts = torch.split(v, self.sizes)
        directions = [
            parts[i].view(shape).to(device=device, dtype=dtype)
            for i, shape, dtype, device in self.places
        ]
        images = torch.autograd.grad(
            self.outputs, self.parameters, directions, retain_graph=keep_graph, allow_unused=True
        )
        return flat(images, self.parameters, self.dtype)


def cached(loss: Loss) -> Derivatives:
    """A product costs 1.6 to 2.4 gradients; the graph of every batch stays in memory."""
    with loss.running():
        graphs = [(share, double_backward(of, loss.weights)) for share, of in loss.each()]
    runs_model: bool | None = None

    def product(v: Tensor) -> Tensor:
        """A checkpointed layer runs its forward pass again in every backward pass, which may count
        in its buffers. The first product shows whether there is any; if not, none needs a guard.
        """
        nonlocal runs_model
        if runs_model is False:
            return _total(graphs, v)
        with loss.running(), watched() as ran:
            image = _total(graphs, v)
            runs_model = ran()
        return image

    return Derivatives(
        torch.stack([share * part.loss for share, part in graphs]).sum(),
        reduce(torch.add, [share * part.gradient for share, part in graphs]),
        product,
    )


def _total(graphs: Sequence[tuple[float, Derivatives]], v: Tensor) -> Tensor:
    (share, first), *others = graphs
    total = first.product(v)
    if share != 1.0:
        total *= share
    for share, graph in others:
        total.add_(graph.product(v), alpha=share)
    return total


@contextmanager
def watched() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a module has run or a random number was drawn."""
    ran: list[bool] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: ran.append(True))
    before = random_streams()
    try:
        yield lambda: bool(ran) or random_streams() != before
    finally:
        hook.remove()


@contextmanager
def plain_backward(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Derivatives as they are: gradients on, no autocast, and the user's tensor hooks silent."""
    hooks = [table for p in parameters if (table := p._backward_hooks)]
    before = [dict(table) for table in hooks]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on, too
        for device in {"cpu", parameters[0].device.type}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for table in hooks:
            table.clear()
        try:
            yield
        finally:
            for table, entries in zip(hooks, before, strict=True):
                table.update(entries)
