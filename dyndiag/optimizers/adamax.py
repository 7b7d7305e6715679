"""Adamax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.adam import averaging_gain, precise, warming_up
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = (1 − β₁ᵗ) u, with u the decayed maximum of |g| + ε."""
    if "exp_inf" not in state:
        return None
    beta1, step = float(group["betas"][0]), int(state["step"])
    return TensorRule(
        learning_rate,
        averaging_gain(beta1),
        preconditioner=(1 - beta1**step) * precise(state["exp_inf"]),
        coupled_decay=float(group["weight_decay"]),
        warmup=warming_up(step, beta1),
    )
