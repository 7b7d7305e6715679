"""Adam and AdamW, AMSGrad included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) and Γ = (1 − β₁)/(1 + β₁); AMSGrad takes the largest v."""
    if "exp_avg_sq" not in state:
        return None
    beta1, beta2 = map(float, group["betas"])
    step = int(state["step"])
    v = precise(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    spread = (v / (1 - beta2**step)).sqrt() + float(group["eps"])
    return TensorRule(
        learning_rate,
        averaging_gain(beta1),
        preconditioner=(1 - beta1**step) * spread,
        warmup=warming_up(step, beta1),
        **decays(group),
    )


def averaging_gain(beta: float) -> float:
    """Γ of an exponential average of the gradients, (1 − β)/(1 − β z⁻¹) at z = −1."""
    return (1 - beta) / (1 + beta)


def warming_up(step: int, beta1: float) -> bool:
    """t < ⌈ln .01 / ln β₁⌉, 44 at .9: until then the bias correction moves P by more than 1 %."""
    return beta1 > 0 and step < math.ceil(math.log(0.01) / math.log(beta1))


def decays(group: Mapping[str, Any]) -> dict[str, float]:
    """Adam's weight decay, which a flag of the group decouples: AdamW is Adam with that flag."""
    decoupled = group.get("decoupled_weight_decay", False)
    return {"decoupled_decay" if decoupled else "coupled_decay": float(group["weight_decay"])}


def precise(moment: Tensor) -> Tensor:
    """The moment in float32 at least, off the graph: 16 bits would round a square root to 1 %."""
    return moment.detach().to(torch.promote_types(moment.dtype, torch.float32))
