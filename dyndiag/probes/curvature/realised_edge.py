"""Whether a step was too long, where no frozen preconditioner can tell."""

from __future__ import annotations

import torch

from dyndiag.curvature import realised_edge
from dyndiag.optimizers import Unknown, read_rule
from dyndiag.probes.predictions.outputs import value_without_graph
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState

_LONGEST_WARM_UP = 100
"""Steps; ln 0.01 / ln β₁ is 44 at β₁ = 0.9 and 90 at 0.95."""


class RealisedEdge:
    """`stability/realised_edge` ζ of a step taken while the optimizer warms up.

    With A = gᵀΔ the decrease that the gradient promised for the step −Δ, and L the loss of the
    step's own batch in eval mode, ζ = (A + L(θ−Δ) − L(θ)) / A. On a quadratic ζ = ½η·λ_dir, and
    ζ > 1 if and only if the step raised the loss. NaN if A ≤ 0.

    Only for Adam-like optimizers, in the steps before their moments have settled, and only at
    steps for which the weights before were kept. Cost: one gradient and one forward.
    """

    name = "RealisedEdge"

    def __init__(self, due: Schedule) -> None:
        self.due = due

    def applies(self, state: TrainState) -> bool:
        return (
            state.step < _LONGEST_WARM_UP
            and state.weights_before is not None
            and state.loss_fn is not None
            and state.batch is not None
        )

    def measure(self, state: TrainState) -> Measurements:
        assert state.weights_before is not None
        rule = read_rule(state.optimizer, state.parameters, state.learning_rates)
        if isinstance(rule, Unknown) or not rule.warmup:
            return {}
        state.model.eval()
        after = value_without_graph(state.batch_loss).double()
        with torch.no_grad():
            change = torch._foreach_sub(list(state.weights_before), list(state.parameters))
            for parameter, before in zip(state.parameters, state.weights_before, strict=True):
                parameter.data.copy_(before)
        loss = state.batch_loss()
        gradient = torch.autograd.grad(loss, state.parameters, allow_unused=True)
        promised = torch.stack(
            [
                (g.double() * d.double()).sum().to(loss.device)
                for g, d in zip(gradient, change, strict=True)
                if g is not None
            ]
        ).sum()
        return {"stability/realised_edge": realised_edge(promised, loss.detach().double(), after)}
