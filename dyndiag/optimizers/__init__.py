"""Where an optimizer's steps become locally unstable, and its preconditioner."""

from __future__ import annotations

from dyndiag.optimizers.read import read_rule
from dyndiag.optimizers.rule import (
    TensorRule,
    Unknown,
    UpdateRule,
    edge_operator,
    preconditioned_operator,
)

__all__ = [
    "TensorRule",
    "Unknown",
    "UpdateRule",
    "edge_operator",
    "preconditioned_operator",
    "read_rule",
]
