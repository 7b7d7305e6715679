"""The derivative of the gradient along a direction, carried forward through the backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dyndiag.curvature.engines.engine import Derivatives
from dyndiag.curvature.engines.loss import Loss, flat
from dyndiag.curvature.engines.surroundings import padding_held, standing_in


def forward_over_reverse(loss: Loss) -> Derivatives:
    """A product costs 3.6 to 4.6 gradients, and four times the memory of a training step.

    Needs a forward derivative of each backward function, where double backward needs a backward
    one: a kernel may have only either.
    """
    with loss.running():
        start = loss.value_and_gradient()

    def product(v: Tensor) -> Tensor:
        with loss.running(), warnings.catch_warnings(), forward_ad.dual_level():
            # torch compiles its own forward derivatives with what it calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            duals = [
                forward_ad.make_dual(w, direction)
                for w, direction in zip(loss.weights, loss.split(v), strict=True)
            ]

            def along(of: Callable[[], Tensor]) -> Tensor:
                gradient = torch.autograd.grad(of(), duals, allow_unused=True)
                tangents = [
                    None if part is None else forward_ad.unpack_dual(part).tangent
                    for part in gradient
                ]
                return flat(tangents, loss.weights, loss.dtype)

            with padding_held(loss.model), standing_in(loss.model, loss.places(duals)):
                return loss.total(along)

    return Derivatives(start[-1], start[:-1], product)
