"""Whether a product is that of the loss: exact second derivatives against finite differences.

A custom kernel can be silently wrong: a backward function that detaches what it uses, or computes
outside of autograd, has a right gradient and a wrong second derivative, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dyndiag.curvature.draws import fixed_generator
from dyndiag.curvature.engines.engine import Check
from dyndiag.curvature.engines.finite_differences import difference, in_float64
from dyndiag.curvature.engines.loss import Loss
from dyndiag.curvature.lanczos import norms

_FINE, _ROUGH = (1e-7, 1e-4), (2e-3, 1e-2)
"""Step, in sizes of the weights, and the difference that still counts as agreement: in float64,
with a step so short that hardly a kink of a ReLU lies within it, and in float32."""
_CLEARLY = 5.0


def against_differences(loss: Loss, product: Callable[[Tensor], Tensor], gradient: Tensor) -> Check:
    """Along one random direction, each weight drawn in proportion to the size of its parameter.

    Cost: one product and 4 gradients. Where these do not settle it, 5 more for float32 weights, in
    float64; and 4 more for float64 weights, by a long step, since their loss may be computed in
    float32 nevertheless.
    """
    scale = _sizes(loss)
    noise = torch.randn(loss.size, generator=fixed_generator(), dtype=torch.float64)
    direction = noise.to(scale) * scale
    image = product(direction) * scale

    def compared(run: Loss, step: float, tolerance: float, before: int) -> Check:
        to = run.dtype
        wide, narrow = (
            scale.to(to) * difference(run, direction.to(to), h) for h in (step, step / 3)
        )
        size = max(float(norms(image)), float(norms(narrow))) or 1.0
        spread = float(norms(wide - narrow)) / size
        misfit = min(float(norms(image.to(to) - other)) for other in (wide, narrow)) / size
        found = Check("inconclusive", misfit, spread, before + 4)  # NaN too
        if misfit <= tolerance:
            return replace(found, outcome="agrees")
        return replace(found, outcome="disagrees") if misfit > _CLEARLY * spread else found

    if loss.dtype == torch.float64:
        first = compared(loss, *_FINE, 0)
        if first.outcome != "inconclusive":
            return first
        second = compared(loss, *_ROUGH, 4)
        return second if second.outcome == "agrees" else replace(first, gradients=8)
    first = compared(loss, *_ROUGH, 0)
    if first.outcome == "agrees" or (double := in_float64(loss, gradient)) is None:
        return first
    return compared(double, _FINE[0], _ROUGH[1], 5)


def _sizes(loss: Loss) -> Tensor:
    """Each weight's scale: the root mean square of its parameter, or of all for one at zero."""
    squares = [w.detach().to(loss.dtype).square().mean() for w in loss.weights]
    typical = torch.stack(squares).mean()
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    sizes = [torch.where(square > 0, square, typical).sqrt() for square in squares]
    return torch.cat([s.expand(w.numel()) for s, w in zip(sizes, loss.weights, strict=True)])
