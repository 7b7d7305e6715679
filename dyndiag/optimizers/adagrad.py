"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.adam import precise
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = √Σg² + ε, at the rate η/(1 + (t − 1) · lr_decay)."""
    step = int(state["step"]) if "sum" in state else 0
    if step == 0:  # the state is there from the start, before any step
        return None
    return TensorRule(
        learning_rate / (1 + (step - 1) * float(group["lr_decay"])),
        1.0,
        preconditioner=precise(state["sum"]).sqrt() + float(group["eps"]),
        coupled_decay=float(group["weight_decay"]),
    )
