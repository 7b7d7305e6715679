"""The gradient, linearised once: what does not depend on the direction is computed at set-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dyndiag.curvature.engines.engine import Derivatives
from dyndiag.curvature.engines.forward_over_reverse import forward_over_reverse
from dyndiag.curvature.engines.loss import Loss, flat
from dyndiag.curvature.engines.surroundings import padding_held, random_streams, standing_in

_SAME = 1e-3


def linearised(loss: Loss) -> Derivatives:
    """A product costs 1.7 to 2.4 gradients after a set-up of 25 to 180: for hundreds of products.

    By `torch.func.linearize`, with more memory than `cached`. What that cannot trace raises:
    buffers that change in the forward pass (BatchNorm in train mode), checkpoints, numbers read out
    of tensors.
    """
    with loss.running():
        start = loss.value_and_gradient()
    # Where a forward derivative is missing, this raises, and `linearize` may end the process.
    forward_over_reverse(loss).product(start[:-1])
    with loss.running(), warnings.catch_warnings():  # torch's own, about the graph that it makes
        warnings.simplefilter("ignore")
        maps = [(share, _linear_map(loss, of)) for share, of in loss.each()]

    def image(v: Tensor) -> Tensor:
        directions = tuple(loss.split(v))
        total = torch.zeros_like(v)
        for share, along in maps:
            total += share * flat(along(directions), loss.weights, loss.dtype)
        return total

    with loss.running():
        before = random_streams()
        first = image(start[:-1])
        draws = random_streams() != before  # dropout's masks are drawn anew in each product
    with loss.running():
        second = image(start[:-1])
    if (first - second).norm() > _SAME * first.norm():
        raise RuntimeError("what torch.func.linearize made gives another image at the second call")

    def product(v: Tensor) -> Tensor:
        loss.require_unchanged()
        with loss.running() if draws else torch.no_grad():
            return image(v)

    return Derivatives(start[-1], start[:-1], product)


def _linear_map(
    loss: Loss, of: Callable[[], Tensor]
) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def value(weights: tuple[Tensor, ...]) -> Tensor:
        with padding_held(loss.model), standing_in(loss.model, loss.places(weights)):
            return of()

    at = tuple(w.detach() for w in loss.weights)
    # Without functionalize, in-place operations of an RNN's backward pass would change the
    # constants of the map at each call.
    return torch.func.linearize(torch.func.functionalize(torch.func.grad(value)), at)[1]
