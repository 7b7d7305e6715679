"""Sharpness-aware minimisation: its edge for a rate η and a radius ρ, and what its ratio hides.

SAM takes the gradient at θ + ρ∇L(θ) (un-normalised) or at θ + ρ∇L(θ)/‖∇L(θ)‖ (normalised, the usual
one), and gives it to a base optimizer. On a quadratic with Hessian H the un-normalised one acts as
its base optimizer does on H + ρH², so everything in `rule` holds with that matrix.

**A normalised ratio of 1 is no evidence of an edge of stability.** There the radius is in effect
ρ/‖∇L‖, which grows as the gradient shrinks: on a quadratic that plain descent minimises (ηλ < 2)
normalised SAM ends in a cycle of two steps along the top eigenvector, of amplitude ηλρ/(2 − ηλ), on
which its ratio is *exactly* 1 whatever λ is. So look whether λ₁ rose before, and at λ₁ against the
base optimizer's own threshold 2/(ηΓ). No event may rest on this ratio alone.

Sources: Foret et al. (2021), arXiv 2010.01412, for SAM; Agarwala & Dauphin (2023), "SAM operates
far from home", arXiv 2302.08692, and Long & Bartlett (2024), "Sharpness-aware minimization and the
edge of stability", arXiv 2309.12488, for its edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dyndiag.curvature import Operator
from dyndiag.errors import DyndiagError
from dyndiag.optimizers.read import read_rule
from dyndiag.optimizers.rule import Unknown, UpdateRule

_NAMES = {"SAM": True, "USAM": False}
"""Classes that are known by name → whether they divide by the gradient's norm."""


@dataclass(frozen=True)
class SAMRule:
    """SAM over a base optimizer whose rule is known."""

    radius: float
    """ρ."""
    normalised: bool
    """Whether ρ is divided by the gradient's norm: the edge then moves with it."""
    base: UpdateRule

    def effective_radius(self, gradient_norm: float) -> float:
        """ρ, or ρ/‖∇L‖ where it is normalised: ∞ without a gradient."""
        if not self.normalised or self.radius == 0:
            return self.radius
        return self.radius / gradient_norm if gradient_norm != 0 else math.inf


def sam_ratio(sharpness: float, learning_rate: float, radius: float, gain: float = 1.0) -> float:
    """½ηΓλ(1 + ρλ), λ = λ₁(H): 1 is the edge of un-normalised SAM. Range: all numbers.

    `gain`: Γ of the base optimizer, 1/(1 + β) for heavy ball. For normalised SAM put ρ/‖∇L‖ in the
    place of `radius`, and read in this module's head why 1 means nothing then.

    >>> round(sam_ratio(17.082039, learning_rate=0.1, radius=0.01), 6)
    1.0
    """
    return 0.5 * learning_rate * gain * sharpness * (1 + radius * sharpness)


def sam_threshold(learning_rate: float, radius: float, gain: float = 1.0) -> float:
    """The sharpness at the edge of un-normalised SAM, (√(1 + 8ρ/(ηΓ)) − 1)/(2ρ) < 2/(ηΓ).

    The root of ηΓλ(1 + ρλ) = 2: exact on a quadratic, for the base optimizers whose Γ is known,
    without preconditioner and decay. At ρ = 0 it is 2/(ηΓ).

    >>> round(sam_threshold(0.1, 0.5), 4), round(sam_threshold(0.1, 0.01, gain=1 / 1.9), 4)
    (5.4031, 29.3725)
    """
    if not (learning_rate >= 0 and radius >= 0 and gain > 0):
        raise DyndiagError(
            "learning_rate and radius must be 0 or more and gain above 0, but they are "
            f"{learning_rate}, {radius} and {gain}"
        )
    step = learning_rate * gain
    if step == 0:
        return math.inf
    return 4 / (step * (math.sqrt(1 + 8 * radius / step) + 1))  # no difference of near numbers


def sam_operator(hessian: Operator, radius: float) -> Operator:
    """H + ρH², on which the base optimizer acts as un-normalised SAM acts on H. Two products of H.

    So `edge_operator(sam_operator(hessian, radius), base)` has twice SAM's edge ratio for largest
    eigenvalue, with any preconditioner, decay and groups of the base optimizer.
    """
    if not 0 <= radius < math.inf:
        raise DyndiagError(f"radius must be a finite number, 0 or more, but it is {radius}")

    def product(v: Tensor) -> Tensor:
        image = hessian.product(v)
        return image + radius * hessian.product(image)

    return Operator(product, hessian.size, hessian.dtype, hessian.device, parts=hessian.parts)


def read_sam(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    learning_rates: Sequence[float] | None = None,
) -> SAMRule | Unknown | None:
    """SAM's rule read off a live wrapper; None if the optimizer is no wrapper with a radius.

    A wrapper has a `base_optimizer`, and `rho` in its parameter groups, its defaults or itself.
    Known are those whose class, or one that it derives from, is called `SAM` (normalised, as the
    usual implementations are, unless `normalize` or `normalized` in one of these places is False)
    or `USAM` (un-normalised). Unknown: other names (GSAM, LookSAM, … move otherwise),
    `adaptive=True`, groups of different radius, a base optimizer that `read_rule` does not know.
    `parameters` and `learning_rates` as there. A base optimizer given without its wrapper does not
    show SAM.
    """
    base = getattr(optimizer, "base_optimizer", None)
    radii = _settings(optimizer, "rho")
    if base is None or not radii:
        return None
    name = type(optimizer).__name__
    kinds = [_NAMES[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _NAMES]
    if not kinds:
        return Unknown(f"{name} has a radius and a base optimizer, but only SAM and USAM are known")
    if not isinstance(base, Optimizer):
        return Unknown(f"the base optimizer of {name} is a {type(base).__name__}, no Optimizer")
    if len(set(radii)) > 1 or not 0 <= radii[0] < math.inf:
        return Unknown(f"{name} has no one radius: its groups have {sorted(set(radii))}")
    if any(_settings(optimizer, "adaptive")):
        return Unknown(f"{name} scales its radius by the weights (adaptive=True)")
    flags = _settings(optimizer, "normalize") + _settings(optimizer, "normalized")
    rates = learning_rates
    if rates is not None and len(rates) != len(base.param_groups):
        rates = None
    rule = read_rule(base, parameters, rates)
    if isinstance(rule, Unknown):
        return replace(rule, reason=f"of {name}'s base optimizer {rule.reason}")
    return SAMRule(float(radii[0]), kinds[0] and all(flags), rule)


def _settings(optimizer: Optimizer, key: str) -> list[Any]:
    """The value of an option in each group; else among the defaults, or on the object."""
    found = [group[key] for group in getattr(optimizer, "param_groups", ()) if key in group]
    if found:
        return found
    if key in (defaults := getattr(optimizer, "defaults", {})):
        return [defaults[key]]
    return [getattr(optimizer, key)] if hasattr(optimizer, key) else []
