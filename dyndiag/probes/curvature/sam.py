"""Where sharpness-aware minimisation stands against an edge of its own."""

from __future__ import annotations

import math

import torch

from dyndiag.curvature.follow import Follower
from dyndiag.optimizers import (
    Unknown,
    edge_operator,
    read_sam,
    sam_operator,
    sam_ratio,
    sam_threshold,
)
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.estimates import can_measure_loss
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_RATIO = "stability/sam_ratio"


class SAMRatio:
    """`stability/sam_ratio`: the edge ratio of SAM, for its rate η and radius ρ.

    Over plain SGD, with or without momentum and coupled decay, ½ηΓ(λ(1 + ρ̂λ) + γ) with λ the
    sharpness of the probe batch (eval mode), ρ̂ = ρ for un-normalised SAM and ρ/‖∇L‖ for normalised
    SAM, ∇L the probe batch's gradient at the weights after the step. Beside it
    `stability/sam_base_ratio`, the base optimizer's own edge ratio ½ηΓ(λ + γ), and
    `stability/sam_threshold`, the λ at which the ratio is 1 with the present ρ̂. Over a base with a
    preconditioner, or whose groups differ, the ratio alone, ½λ₁(A^½(H + ρ̂H² + γ)A^½ + ηγ_d), by
    products of twice the cost. Range: all numbers; negative curvature has no part in it.

    **For normalised SAM (the usual one) a ratio of 1 is no evidence of an edge of stability.** Its
    edge moves with the gradient, and on a quadratic that plain descent minimises it ends in a cycle
    on which the ratio is exactly 1, whatever λ is. Look whether `curvature/sharpness` rose before,
    and at `stability/sam_base_ratio`. No event opens from any of these series. With minibatches the
    radius is over the norm of each batch's own gradient, which is larger than the probe's near a
    minimum: the ratio is then too large.

    SAM is known by its wrapper, handed to the monitor as the optimizer: `read_sam` says how. Any
    other wrapper is told once, and absent. `Sharpness` writes no edge ratio under a wrapper.

    Cost: one gradient, 3–14 Hessian-vector products, 4–20 more where certified (twice that over a
    preconditioner). Default: at most 1 % of training time. Sources: `dyndiag.optimizers.sam`.
    """

    name = "SAMRatio"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=20)
        self._hessian = CheckedHessian()
        self.notices = self._hessian.notices
        self._follower = Follower(torch.Generator().manual_seed(3))

    def applies(self, state: TrainState) -> bool:
        return can_measure_loss(state) and hasattr(state.optimizer, "base_optimizer")

    def measure(self, state: TrainState) -> Measurements:
        rule = read_sam(state.optimizer, state.parameters, state.learning_rates)
        if isinstance(rule, Unknown):
            self.notices.append(f"no {_RATIO}: {rule.reason}")
        if rule is None or isinstance(rule, Unknown):
            return {}
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        radius = rule.effective_radius(float(hessian.gradient.norm()))
        line = rule.base.edge_ratio_line()
        if line is None or rule.base.preconditioned:
            if math.isinf(radius):
                return {}
            operator = edge_operator(sam_operator(hessian, radius), rule.base)
            found = self._follower.largest(operator)
            return {
                _RATIO: Estimate(
                    found.value / 2,
                    found.error_bound / 2,
                    2 * found.products,
                    found.converged,
                    found.provisional,
                    upper_bound=None if found.upper_bound is None else found.upper_bound / 2,
                )
            }
        found = self._follower.largest(hessian)
        slope, offset = line
        bend = slope * (1 + 2 * radius * max(found.value, 0.0))  # the ratio's slope in λ

        def ratio(sharpness: float) -> float:
            return sam_ratio(sharpness, 2 * slope, radius) + offset

        upper = found.upper_bound
        seen: Measurements = {
            _RATIO: Estimate(
                ratio(found.value),
                bend * found.error_bound,
                found.products,
                found.converged,
                found.provisional,
                upper_bound=None if upper is None else ratio(upper),
            ),
            "stability/sam_base_ratio": slope * found.value + offset,
        }
        if slope > 0 and offset < 1 and not math.isinf(radius):
            seen["stability/sam_threshold"] = sam_threshold(2 * slope / (1 - offset), radius)
        return seen
