"""ASGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = 1, Γ = 1 at the rate η_t = η/(1 + λη(t − 1))^α; `lambd` λ decays the weights themselves.

    This is of the weights that the gradients are taken at, not of their average `ax`. A scheduler
    reaches η_t a step late: at such a step the rate is off by its one change.
    """
    step = int(state["step"]) if "eta" in state else 0
    if step == 0:
        return None
    decay = float(group["lambd"])
    return TensorRule(
        learning_rate / (1 + decay * learning_rate * (step - 1)) ** float(group["alpha"]),
        1.0,
        coupled_decay=float(group["weight_decay"]),
        decoupled_decay=decay,
    )
