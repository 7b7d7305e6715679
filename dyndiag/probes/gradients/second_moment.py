"""The second moment of the gradients that an Adam-like optimizer keeps, as its state holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Number = float | Tensor
"""A 0-d tensor where the optimizer counts its steps on an accelerator, which is not waited for."""


@dataclass(frozen=True)
class SecondMoment:
    """Of one parameter, and how the optimizer divides by it: g / (√(divisor / correction) + ε)."""

    mean: Tensor
    """v, the running mean of g²; Adamax: u, the running maximum of |g|."""
    weight: Number
    """What the weights in that mean add up to, 1 − β₂ᵗ; 1 for a maximum."""
    is_maximum: bool = False
    divisor: Tensor | None = None
    """v; AMSGrad: the largest v so far. None where the optimizer divides by something else."""
    correction: Number = 1.0
    floor: Number = 0.0
    """ε in units of √divisor: what is added to it, or ε√correction."""


def second_moment(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor
) -> SecondMoment | None:
    """Of the parameter as it is now; None before its first step, or where none is known.

    Known: `exp_avg_sq` with `betas` (Adam, AdamW, NAdam, RAdam, and others that keep to these
    names), `square_avg` with `alpha` (RMSprop), `exp_inf` (Adamax).
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if "step" not in state:
        return None
    step, eps = _count(state["step"]), group.get("eps", 0.0)
    found = None
    if "exp_avg_sq" in state and "betas" in group:
        v = state["exp_avg_sq"]
        weight: Number = 1 - group["betas"][1] ** step
        rectified = isinstance(optimizer, torch.optim.RAdam)  # adds ε before it corrects
        floor = eps if rectified else eps * weight**0.5
        divisor = state.get("max_exp_avg_sq") if group.get("amsgrad", False) else None
        divisor = v if divisor is None else divisor
        found = SecondMoment(v, weight, False, divisor, weight, floor)
    elif "square_avg" in state and "alpha" in group:
        v = state["square_avg"]
        divisor = None if group.get("centered", False) else v
        found = SecondMoment(v, 1 - group["alpha"] ** step, False, divisor, 1.0, eps)
    elif "exp_inf" in state:
        found = SecondMoment(state["exp_inf"], 1.0, is_maximum=True)
    return found if found is not None and found.mean.shape == parameter.shape else None


def _count(step: Any) -> Any:
    if not isinstance(step, Tensor):
        return step
    return float(step) if step.device.type == "cpu" else step.double()
