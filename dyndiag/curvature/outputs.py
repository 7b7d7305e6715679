"""A loss cut in two at the model's output z: weights → z → loss, and the derivatives of each half.

What Gauss–Newton and Fisher matrices are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dyndiag.curvature.data import tensors
from dyndiag.curvature.engines.cached import plain_backward, watched
from dyndiag.curvature.engines.loss import (
    Loss,
    finite,
    flat,
    vector_dtype,
    versions,
)
from dyndiag.errors import DyndiagError

Outputs = Sequence[Tensor]
"""One tensor for each tensor of the model's output that the loss is computed from."""

_Edge = tuple[Any, int]
"""A place in the autograd graph: a node, and which of its results."""


@dataclass(frozen=True)
class LossOfOutput:
    """One batch's loss as a function of the model's output z, and z as one of the weights."""

    parameters: Sequence[Tensor]
    loss: Tensor
    outputs: Outputs
    """z, with its graph back to the weights; several tensors count as one long vector."""
    slopes: Outputs
    """∂loss/∂z, with its graph back to z."""
    _pulled: tuple[Outputs, Sequence[Tensor | None]] | None
    """w and Jᵀw, with its graph back to w; None if each product makes its own."""

    @property
    def curved(self) -> bool:
        """The loss is not linear in z."""
        return any(slope.requires_grad for slope in self.slopes)

    @property
    def eps(self) -> float:
        """Of the coarsest type between the output and the loss, which may have one of its own."""
        return max(torch.finfo(z.dtype).eps for z in (self.loss, *self.outputs))

    @property
    def tolerance(self) -> float:
        """Of checks: ten times half the digits."""
        return min(0.25, 10 * math.sqrt(self.eps))

    def gradient(self) -> Tensor:
        """∂loss/∂weights, (size,)."""
        return self.transposed_product([slope.detach() for slope in self.slopes])

    def gradient_and_loss(self) -> Tensor:
        """(size + 1,): ∂loss/∂weights, then the loss."""
        gradient = self.gradient()
        return torch.cat((gradient, self.loss.to(gradient).reshape(1)))

    def jacobian_product(self, v: Tensor) -> list[Tensor]:
        """J v, J = ∂z/∂weights, for v (size,): the derivative of Jᵀw by w, applied to v."""
        w, pulled = self._pulled or _pull_back(self.outputs, self.parameters)
        parts = torch.split(v, [p.numel() for p in self.parameters])
        used = [i for i, part in enumerate(pulled) if part is not None and part.requires_grad]
        if not used:
            return [torch.zeros_like(z) for z in self.outputs]
        directions = [parts[i].view(self.parameters[i].shape) for i in used]
        with plain_backward(self.parameters):
            images = torch.autograd.grad(
                [part for i in used if (part := pulled[i]) is not None],
                w,
                [d.to(self.parameters[i]) for i, d in zip(used, directions, strict=True)],
                retain_graph=self._pulled is not None,
                materialize_grads=True,
            )
        return [image.detach() for image in images]

    def transposed_product(self, u: Outputs) -> Tensor:
        """Jᵀu, (size,): one backward pass through the model."""
        with plain_backward(self.parameters):
            parts = torch.autograd.grad(
                list(self.outputs), self.parameters, list(u), retain_graph=True, allow_unused=True
            )
        return flat(parts, self.parameters, vector_dtype(self.parameters))

    def loss_hessian_product(self, u: Outputs) -> list[Tensor]:
        """(∂²loss/∂z²) u: a backward pass through the loss alone, which no class × class block
        is ever made for."""
        bent = [(slope, d) for slope, d in zip(self.slopes, u, strict=True) if slope.requires_grad]
        with plain_backward(self.parameters):
            images = torch.autograd.grad(
                [slope for slope, _ in bent],
                list(self.outputs),
                [d for _, d in bent],
                retain_graph=True,
                materialize_grads=True,
            )
        return [image.detach() for image in images]


def check_products(batch: LossOfOutput, *, of_loss: bool = True) -> None:
    """Raises DyndiagError where the model, or the loss, lacks the derivatives that products need.

    ⟨u, J v⟩ by the backward pass's derivative must be ⟨Jᵀu, v⟩ by the backward pass: a kernel of
    the user's own may give a first derivative and a wrong second one. Costs one product.
    """
    u = normal_like(batch.outputs, 0)
    back = batch.transposed_product(u)
    (v,) = normal_like([back], 1)
    try:
        image = batch.jacobian_product(v)
        if of_loss and batch.curved:
            batch.loss_hessian_product(u)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DyndiagError(
            "the product with a Gauss–Newton or Fisher matrix needs derivatives of the backward "
            f"pass that the model or its loss does not have: {str(error).splitlines()[0]}"
        ) from error
    forth = sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(u, image, strict=True))
    gap = abs(forth - float((back * v).sum(dtype=torch.float64)))
    if gap > batch.tolerance * (norm(image) + abs(forth)):
        raise DyndiagError(
            "the model's backward pass cannot be differentiated: ⟨u, J v⟩ and ⟨Jᵀu, v⟩ differ by "
            f"{gap:.2g} of {abs(forth):.2g}; look for a torch.autograd.Function whose backward is "
            "not made of differentiable operations"
        )


def normal_like(tensors: Outputs, seed: int) -> list[Tensor]:
    """Fixed standard normal entries of their shapes, from the CPU, so the same on each device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator).to(device=t.device, dtype=t.dtype)
        for t in tensors
    ]


def norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in parts))


Term = Callable[[LossOfOutput, float], Tensor]


def over_batches(loss: Loss) -> Callable[[Term], Tensor]:
    """A function that adds up, over the batches, what it is told to make of each and its share.

    The graph of a single batch is built once and kept. Of several, one at a time is, at each call.
    """
    if len(loss.batches) > 1:

        def total(term: Term) -> Tensor:
            with loss.running():
                every = loss.each()
                return reduce(torch.add, (term(_of(loss, of, False), share) for share, of in every))

        return total

    with loss.running():
        [(share, whole)] = [(share, _of(loss, of, True)) for share, of in loss.each()]

    built_at = versions(list(loss.parameters.values()))
    runs_model: bool | None = None

    def of_whole(term: Term) -> Tensor:
        """A checkpointed layer runs its forward pass again in every backward pass, which may leave
        a trace. The first call shows whether there is any; if not, none needs a guard.
        """
        nonlocal runs_model
        if runs_model is False and versions(list(loss.parameters.values())) == built_at:
            return term(whole, share)
        with loss.running(), watched() as ran:  # which raises where the weights have changed
            found = term(whole, share)
            runs_model = ran()
        return found

    return of_whole


def _of(loss: Loss, of: Callable[[], Tensor], kept: bool) -> LossOfOutput:
    weights = dict(zip(loss.parameters, loss.weights, strict=True))
    return loss_of_output(loss.model, of, weights, kept)


def loss_of_output(
    model: nn.Module, of: Callable[[], Tensor], parameters: Mapping[str, Tensor], kept: bool
) -> LossOfOutput:
    """Runs `of()` once, and finds the output of the model that this loss is computed from.

    That is: of the floating-point tensors in whatever `model(...)` returned, in however many calls,
    those that the graph of the loss meets first on its way back. So it does not matter whether
    the loss is computed outside the model, or inside from logits that are returned as well.

    Raises DyndiagError if a way from the loss to `parameters` leads around them, as a weight
    penalty does, or if one of them was computed from another.
    """
    trained = list(parameters.values())
    with plain_backward(trained):
        with _caught(model) as caught:
            loss = finite(of())
        outputs = _between(loss, caught, parameters)
        slopes = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
    pulled = _pull_back(outputs, trained) if kept else None
    return LossOfOutput(trained, loss.detach(), outputs, slopes, pulled)


def _pull_back(
    outputs: Outputs, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Jᵀw, linear in a w whose value does not matter."""
    with plain_backward(parameters):
        w = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pulled = torch.autograd.grad(
            list(outputs), parameters, w, create_graph=True, allow_unused=True
        )
    if all(part is None for part in pulled):
        raise DyndiagError(
            "the loss depends on none of the parameters asked for: compute it with the model "
            "whose curvature you ask for"
        )
    return w, pulled


@contextmanager
def _caught(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the tensors of every output of the model."""
    found: list[Tensor] = []
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        inside = list(tensors(output)) or list(tensors(getattr(output, "__dict__", None)))
        found.extend(z for z in inside if z.is_floating_point() and z.requires_grad)

    handle = model.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
    if calls == 0:
        raise DyndiagError(
            "loss_fn did not call the model itself, so its output is unknown: compute the loss "
            "from model(...), not from one of its submodules or methods"
        )


def _between(
    loss: Tensor, caught: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> list[Tensor]:
    """Those of the caught tensors that separate the loss from the parameters."""
    # A model that computes its own loss returns it, too; one that returns a single number has it
    # for output.
    longer = [z for z in caught if z.dim() > 0]
    nearest, around = _way_back(loss, longer, parameters)
    if around is not None or not nearest:
        nearest, around = _way_back(loss, caught, parameters)
    if around is not None:
        raise DyndiagError(
            f"the loss depends on {around} by another way than the model's output, as a weight "
            "penalty or a loss inside the model does, and a Gauss–Newton matrix knows the output "
            "alone: leave a penalty out and add its curvature, as in shifted(operator, decay), and "
            "let the model return what its loss is computed from"
        )
    if not nearest:
        raise DyndiagError(
            "the loss depends on none of the trainable parameters: compute it with the model "
            "whose curvature you ask for"
        )
    if len(nearest) > 1:
        _check_apart(nearest)
    return nearest


def _way_back(
    loss: Tensor, candidates: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> tuple[list[Tensor], str | None]:
    """The candidates met first on the way back from the loss, and a parameter met before any."""
    edges = {_edge(z): z for z in candidates}
    names = {id(p): name for name, p in parameters.items()}
    met: dict[_Edge, None] = {}
    for edge in _ancestors([_edge(loss)], edges):
        if edge in edges:
            met[edge] = None
        elif (name := names.get(id(getattr(edge[0], "variable", None)))) is not None:
            return [], name
    return [z for edge, z in edges.items() if edge in met], None


def _check_apart(outputs: Sequence[Tensor]) -> None:
    edges = {_edge(z) for z in outputs}
    for z in outputs:
        if any(edge in edges for edge in _ancestors(_inputs(_edge(z)[0]), edges)):
            raise DyndiagError(
                "the loss is computed from two tensors of the model's output of which one was "
                "computed from the other, so there is no one output to take the Gauss–Newton "
                "matrix in: let the loss use one of them, or the model return one"
            )


def _ancestors(start: Sequence[_Edge], stops: Any) -> Iterator[_Edge]:
    """Every place in the graph that the start was computed from, up to and with the stops."""
    todo, seen = list(start), set(start)
    while todo:
        edge = todo.pop()
        yield edge
        if edge not in stops:
            new = [further for further in _inputs(edge[0]) if further not in seen]
            seen.update(new)
            todo += new


def _inputs(node: Any) -> list[_Edge]:
    return [(further, number) for further, number in node.next_functions if further is not None]


def _edge(tensor: Tensor) -> _Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr
