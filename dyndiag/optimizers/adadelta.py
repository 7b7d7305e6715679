"""Adadelta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.adam import precise
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = √(v + ε) / √(d + ε), d the average of squared updates, and Γ = 1.

    d follows the updates, and so P follows the very oscillation that it should be frozen for: as
    long as Adadelta runs, its ratio counts as one of a warm-up, which opens no event. d holds the
    update of the step itself already, which that step did not use.
    """
    if "acc_delta" not in state or int(state["step"]) == 0:
        return None
    epsilon = float(group["eps"])
    gradients, updates = precise(state["square_avg"]), precise(state["acc_delta"])
    return TensorRule(
        learning_rate,
        1.0,
        preconditioner=((gradients + epsilon) / (updates + epsilon)).sqrt(),
        coupled_decay=float(group["weight_decay"]),
        warmup=True,
    )
