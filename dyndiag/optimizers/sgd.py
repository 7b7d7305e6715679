"""SGD, with momentum, dampening, Nesterov's look-ahead and coupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyndiag.optimizers.rule import TensorRule


def read(
    group: Mapping[str, Any], state: Mapping[str, Any], learning_rate: float
) -> TensorRule | None:
    """Heavy ball filters gradients by (1 − τ)/(1 − β z⁻¹), Nesterov by 1 + β/(1 − β z⁻¹).

    The first step, whose buffer is the undamped gradient, is a transient. Without momentum there is
    no state to show whether a tensor was ever moved: it counts as moved.
    """
    beta = float(group["momentum"])
    if beta == 0:
        gain = 1.0
    elif state.get("momentum_buffer") is None:
        return None
    elif group["nesterov"]:
        gain = (1 + 2 * beta) / (1 + beta)
    else:
        gain = (1 - float(group["dampening"])) / (1 + beta)
    return TensorRule(learning_rate, gain, coupled_decay=float(group["weight_decay"]))
