"""RMSprop, centred or not, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.adam import precise
from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """P = √v + ε, centred √(v − m²) + ε, and Γ = 1/(1 + μ).

    Without bias correction P is small at first and the overshoot is real: there is no warm-up to
    excuse it.
    """
    if "square_avg" not in state:
        return None
    v = precise(state["square_avg"])
    if group["centered"]:
        v = v - precise(state["grad_avg"]) ** 2
    return TensorRule(
        learning_rate,
        1 / (1 + float(group["momentum"])),
        preconditioner=v.sqrt() + float(group["eps"]),
        coupled_decay=float(group["weight_decay"]),
    )
