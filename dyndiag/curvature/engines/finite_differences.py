"""Central differences of gradients, for kernels without a second derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from dyndiag.curvature.draws import fixed_generator
from dyndiag.curvature.engines.engine import Check, Derivatives
from dyndiag.curvature.engines.loss import Loss
from dyndiag.curvature.engines.surroundings import padding_held
from dyndiag.curvature.lanczos import norms

_LARGEST, _RATIO, _TRIED = 4.0, 4.0, 6
"""Steps that are tried: `_LARGEST` · eps^⅓ · ‖θ‖, each a quarter of the one before."""
_GOOD = 1e-2


def finite_differences(loss: Loss) -> tuple[Derivatives, Check]:
    """A product costs 2 to 2.7 gradients, and is not exact.

    The step is h‖v‖ = c‖θ‖, with the c for which differences at c and c/4 along half gradient, half
    random direction agree best; how far they disagree is the error stated: some 1e-4 for a smooth
    loss in float32. Differences also see the kinks of a ReLU that lie within the step, which no
    second derivative does, and in float32 there are many. So where the error is above one percent,
    and the loss runs on float64 copies, it does. Set-up: 13 gradients, or 26.
    """
    with loss.running():
        start = loss.value_and_gradient()
    runs, gradient = loss, start[:-1]
    step, error = _best_step(loss, gradient)
    cost = 1 + 2 * _TRIED
    if not error <= _GOOD and (double := in_float64(loss, gradient)) is not None:
        finer, smaller = _best_step(double, gradient.double())
        cost += 1 + 2 * _TRIED
        if smaller < error:
            runs, step, error = double, finer, smaller

    def product(v: Tensor) -> Tensor:
        length = v.norm()
        h = step / torch.where(length > 0, length, torch.ones_like(length))
        return difference(runs, v.to(runs.dtype), h).to(v)

    check = Check("agrees" if error <= _GOOD else "inconclusive", error, error, cost)
    return Derivatives(start[-1], gradient, product), check


def difference(loss: Loss, v: Tensor, step: Tensor | float) -> Tensor:
    """(∇L(θ + step · v) − ∇L(θ − step · v)) / (2 step). Two gradients."""
    sides = []
    for sign in (1, -1):
        offsets = loss.split(sign * step * v)
        with loss.running(), padding_held(loss.model), displaced(loss.weights, offsets):
            sides.append(loss.value_and_gradient(displaced=True)[:-1])
    return (sides[0] - sides[1]) / (2 * step)


def in_float64(loss: Loss, gradient: Tensor) -> Loss | None:
    """The loss on float64 copies. None where it does not run so (kernels for one precision alone,
    too little memory), or is another one, because other random masks are drawn. One gradient.
    """
    if loss.dtype == torch.float64 or loss.device.type == "mps":
        return None
    try:
        double = loss.in_dtype(torch.float64)
        with double.running():
            found = double.value_and_gradient()[:-1]
    except (RuntimeError, TypeError):
        return None
    return double if norms(found - gradient) <= _GOOD * norms(found) else None


def _best_step(loss: Loss, gradient: Tensor) -> tuple[Tensor, float]:
    """The length of a step, and the relative error to expect of it."""
    theta = torch.cat([w.detach().reshape(-1).to(loss.dtype) for w in loss.weights]).norm()
    theta = torch.where(theta > 0, theta, torch.ones_like(theta))
    noise = torch.randn(loss.size, generator=fixed_generator(), dtype=torch.float64)
    direction = _unit(_unit(gradient) + _unit(noise.to(gradient)))
    eps = max(torch.finfo(w.dtype).eps for w in loss.weights)
    steps = [_LARGEST * eps ** (1 / 3) / _RATIO**k * theta for k in range(_TRIED)]
    images = [difference(loss, direction, step) for step in steps]
    errors = [float(norms(a - b) / norms(a)) for a, b in pairwise(images)]
    if not any(image.any() for image in images):  # the loss is linear in its parameters
        return steps[0], 0.0
    best = min(range(len(errors)), key=lambda k: errors[k] if errors[k] >= 0 else torch.inf)
    return steps[best] / _RATIO**0.5, errors[best]


@contextmanager
def displaced(weights: Sequence[Tensor], offsets: Sequence[Tensor]) -> Iterator[None]:
    """The weights moved, then moved back by giving them their own memory again."""
    own = [w.data for w in weights]
    try:
        for w, offset in zip(weights, offsets, strict=True):
            w.data = w.data + offset
        yield
    finally:
        for w, data in zip(weights, own, strict=True):
            w.data = data


def _unit(v: Tensor) -> Tensor:
    length = norms(v)
    return v / torch.where(length > 0, length, torch.ones_like(length)).to(v.dtype)
