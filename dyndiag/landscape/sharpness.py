"""Sharpness in the sense of SAM: how far the loss can rise within a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dyndiag.curvature.data import chosen_parameters
from dyndiag.curvature.draws import fixed_generator
from dyndiag.errors import DyndiagError
from dyndiag.landscape.directions import Chosen
from dyndiag.landscape.progress import bar
from dyndiag.landscape.surface import Surface, wide

_ROUNDED = 0.1
"""Share of a step that may be lost by rounding the weights."""


@dataclass(frozen=True)
class AscentSharpness:
    """Lower bounds of max over ‖δ‖ ≤ ρ of L(θ+δ) − L(θ), as found by gradient ascent."""

    value: float
    """The highest rise found, at least 0: a lower bound of the maximum. NaN where the loss or its
    gradient at θ is not finite."""
    one_step: float
    """The rise at δ = ρ g/‖g‖, the step of SAM: a lower bound, too. 0 where g is."""
    rises: tuple[float, ...]
    """The rise after each step of the ascent."""
    loss: float
    """L(θ)."""
    radius: float
    """ρ."""
    gradients: int
    """Spent, over all of the data, besides one forward pass."""


def ascent_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    radius: float = 0.05,
    steps: int = 10,
    adaptive: bool = False,
    generator: Generator | None = None,
    parameters: Chosen = None,
    eval_mode: bool = True,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    progress: bool = True,
) -> AscentSharpness:
    """Sharpness in the sense of SAM: max over ‖δ‖ ≤ ρ of L(θ+δ) − L(θ), bounded from below.

    The first step is SAM's, δ = ρ g/‖g‖, exact where the loss is linear. Each further one goes ρ
    along the normalised gradient at θ+δ and back onto the ball; the highest rise of all counts. On
    a quadratic at its minimum, where the gradient is zero, the ascent begins in a random direction
    (of `generator`, else always the same) and comes to ½ρ²λ₁ at the rate (1 + λ₂/λ₁)/2 a step.

    `adaptive`: over ‖δ/|θ|‖ ≤ ρ instead, which does not change when layers are rescaled against
    each other; their ρ is ten times as large in the literature.

    Unit: of the loss. Other options as for `line`. Cost: `steps` gradients and one forward pass
    over the data; three vectors of the weights' size.

    Misleads: a lower bound of a maximum says that the loss rises so far, never that it rises no
    farther; and over all of the data it is less than SAM's own, which is over each batch. Sources:
    Foret et al. (2021), "Sharpness-aware minimization"; Kwon et al. (2021), "ASAM".
    """
    if not 0 < radius < math.inf:
        raise DyndiagError(f"radius must be a finite number above 0, but it is {radius!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise DyndiagError(f"steps must be a whole number, 1 or more, but it is {steps!r}")
    surface = Surface(
        model,
        loss_fn,
        data,
        eval_mode=eval_mode,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
    )
    chosen = list(chosen_parameters(model, parameters).values())
    # The ascent moves ε in δ = s·ε, on whose ball all directions are equal.
    scales = [
        p.detach().abs().to(wide(p)) if adaptive else torch.ones((), device=p.device)
        for p in chosen
    ]
    with bar((steps + 1) * surface.batches, "ascent", progress) as tick:

        def uphill(shift: list[Tensor] | None = None) -> tuple[float, list[Tensor]]:
            """Loss, and gradient by ε, at θ + δ."""
            place = (lambda: None) if shift is None else partial(_move, chosen, shift)
            loss, gradient = surface.slope(place, chosen, lambda: tick(1))
            return loss, _times(gradient, scales)

        gradients = 1
        loss, slope = uphill()
        if not (math.isfinite(loss) and math.isfinite(_norm(slope))):
            return AscentSharpness(math.nan, math.nan, (), loss, radius, 1)
        flat = _norm(slope) == 0
        if flat:
            generator = generator or fixed_generator()
            slope = [_draw(g, generator) for g in slope]
        step = [torch.zeros_like(g) for g in slope]
        rises: list[float] = []
        while len(rises) < steps and 0 < (length := _norm(slope)) < math.inf:
            step = [s.add_(g, alpha=radius / length) for s, g in zip(step, slope, strict=True)]
            outside = max(_norm(step) / radius, 1.0)
            step = [s.div_(outside) for s in step]
            shift = _times(step, scales)
            if not rises:
                _check_rounding(chosen, shift)
            if len(rises) == steps - 1:  # nowhere to go from there: no gradient
                there = surface.read(partial(_move, chosen, shift), tick=lambda: tick(1)).loss
            else:
                there, slope = uphill(shift)
                gradients += 1
            rises.append(there - loss)
    highest = max((rise for rise in rises if not math.isnan(rise)), default=0.0)
    one_step = 0.0 if flat else rises[0]
    return AscentSharpness(max(highest, 0.0), one_step, tuple(rises), loss, radius, gradients)


def _times(parts: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    return [part * scale for part, scale in zip(parts, scales, strict=True)]


def _norm(parts: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(part) for part in parts]).norm())


def _draw(like: Tensor, generator: Generator) -> Tensor:
    draw = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return draw.to(like.device)


def _move(parameters: list[nn.Parameter], shift: list[Tensor]) -> None:
    for p, part in zip(parameters, shift, strict=True):
        p.data.copy_(p.data + part)  # .data: a graph that the user holds stays valid


def _check_rounding(parameters: list[nn.Parameter], shift: list[Tensor]) -> None:
    """Raises DyndiagError where the weights are too coarse to move so little."""
    lost = [
        (p.data + part).to(p.dtype).to(part.dtype) - p.data - part
        for p, part in zip(parameters, shift, strict=True)
    ]
    if _norm(lost) > _ROUNDED * _norm(shift):
        raise DyndiagError(
            f"weights of {parameters[0].dtype} are too coarse for a step of this radius, which "
            f"rounding changes by {_norm(lost) / _norm(shift):.0%} of it: pass model.float(), or a "
            "larger radius"
        )
