"""RAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dyndiag.optimizers.adam import averaging_gain, decays, precise, warming_up
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = (1 − β₁ᵗ)(√v + ε)/(√(1 − β₂ᵗ) r_t), and 1 − β₁ᵗ alone while ρ_t ≤ 5."""
    if "exp_avg_sq" not in state:
        return None
    beta1, beta2 = map(float, group["betas"])
    step = int(state["step"])
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    adaptive = torch.ones((), dtype=torch.float64)
    if length > 5:
        rectified = (length - 4) * (length - 2) * longest
        rectified /= (longest - 4) * (longest - 2) * length
        adaptive = precise(state["exp_avg_sq"]).sqrt() + float(group["eps"])
        adaptive = adaptive / math.sqrt((1 - beta2**step) * rectified)
    return TensorRule(
        learning_rate,
        averaging_gain(beta1),
        preconditioner=(1 - beta1**step) * adaptive,
        warmup=warming_up(step, beta1),
        **decays(group),
    )
