"""Double backward through a graph that is made anew for each batch of each product."""

from __future__ import annotations

from torch import Tensor

from dyndiag.curvature.engines.cached import one_product
from dyndiag.curvature.engines.engine import Derivatives
from dyndiag.curvature.engines.loss import Loss


def rebuilt(loss: Loss) -> Derivatives:
    """A product costs 2.7 to 4.2 gradients; one batch's graph at a time is in memory.

    Its peak was 2.2 to 3.1 times that of a training step on the same batch (MLP, CNN, GPTs of 0.06
    to 0.6M weights), 0.6 to 1.1 times by quarters of the batch, and below 1 by sixths.
    """
    with loss.running():
        start = loss.value_and_gradient()

    def product(v: Tensor) -> Tensor:
        with loss.running():
            return loss.total(lambda of: one_product(of, loss.weights, v))

    return Derivatives(start[-1], start[:-1], product)
