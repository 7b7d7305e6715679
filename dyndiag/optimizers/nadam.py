"""NAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.adam import averaging_gain, decays, precise, warming_up
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = √(v/(1 − β₂ᵗ)) + ε; Γ follows the momentum schedule μ_t, which is not bias-free.

    The schedule does not saturate for tens of thousands of steps, and the edge moves with it.
    """
    if "exp_avg_sq" not in state:
        return None
    beta1, beta2 = map(float, group["betas"])
    step, decay = int(state["step"]), float(group["momentum_decay"])

    def mu(t: int) -> float:
        return beta1 * (1 - 0.5 * math.pow(0.96, t * decay))

    product = float(state["mu_product"])  # μ₁ ⋯ μ_t
    of_gradient = (1 - mu(step)) / (1 - product)
    of_average = mu(step + 1) / (1 - product * mu(step + 1))
    spread = (precise(state["exp_avg_sq"]) / (1 - beta2**step)).sqrt() + float(group["eps"])
    return TensorRule(
        learning_rate,
        of_gradient + of_average * averaging_gain(beta1),
        preconditioner=spread,
        warmup=warming_up(step, beta1),
        **decays(group),
    )
