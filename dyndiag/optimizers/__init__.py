"""Where an optimizer's steps become locally unstable, and its preconditioner."""

from __future__ import annotations

from dyndiag.optimizers.clipping import clipped_edge_ratio
from dyndiag.optimizers.minibatch import (
    certain_divergence,
    frobenius_ratio,
    gaussian_edge,
    mean_square_edge,
    plain_sgd_rate,
    single_run_edge,
    sufficient_trace_ratio,
    trace_ratio,
)
from dyndiag.optimizers.read import read_rule
from dyndiag.optimizers.rule import (
    TensorRule,
    Unknown,
    UpdateRule,
    edge_operator,
    preconditioned_operator,
)
from dyndiag.optimizers.sam import SAMRule, read_sam, sam_operator, sam_ratio, sam_threshold

__all__ = [
    "SAMRule",
    "TensorRule",
    "Unknown",
    "UpdateRule",
    "certain_divergence",
    "clipped_edge_ratio",
    "edge_operator",
    "frobenius_ratio",
    "gaussian_edge",
    "mean_square_edge",
    "plain_sgd_rate",
    "preconditioned_operator",
    "read_rule",
    "read_sam",
    "sam_operator",
    "sam_ratio",
    "sam_threshold",
    "single_run_edge",
    "sufficient_trace_ratio",
    "trace_ratio",
]
