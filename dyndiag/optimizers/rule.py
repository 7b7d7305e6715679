"""An optimizer's update rule as data: what its stability depends on, and nothing else.

With its preconditioner frozen, an optimizer acts on each tensor as

    θ⁺ = (1 − ηγ_d) θ − η P⁻¹ (Q ∗ (g + γ_c θ)),

P diagonal, Q a causal filter of the gradients (momentum), γ_c coupled and γ_d decoupled decay.
On a quadratic with Hessian H it first becomes unstable by the period-2 oscillation, where the
filter's gain is Γ = Q(−1). So one symmetric eigenproblem tells how far it is from there, also where
groups differ in rate, momentum and decay: the edge ratio

    χ = ½ λ₁( A^½ (H + diag γ_c) A^½ + diag(η γ_d) ),    A = diag(ηΓ / P),

is 1 at the edge of stability. Negative curvature grows at any rate; that is not this edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndiag.curvature import Operator, scaled


@dataclass(frozen=True)
class TensorRule:
    """How the optimizer moved one tensor at its last step."""

    learning_rate: float
    gain: float
    """Γ, the momentum filter's response to a gradient that changes sign at every step."""
    preconditioner: Tensor | None = None
    """P, of the tensor's shape or one number; None for 1."""
    coupled_decay: float = 0.0
    """γ_c: decay that passes through momentum and preconditioner, as if it were in the loss."""
    decoupled_decay: float = 0.0
    """γ_d: decay of the weights themselves, θ ← (1 − ηγ_d) θ."""
    warmup: bool = False
    """The moments average so few steps that a frozen P does not describe the optimizer yet."""


@dataclass(frozen=True)
class Unknown:
    """No rule, and why, as the end of a sentence."""

    reason: str


@dataclass(frozen=True)
class UpdateRule:
    """The update rule of a whole model, tensor by tensor, in the order of its flat vectors."""

    tensors: tuple[TensorRule | None, ...]
    """None for a tensor that the optimizer does not move."""
    sizes: tuple[int, ...]
    """Number of elements of each tensor."""

    @property
    def preconditioned(self) -> bool:
        """Some P is not 1."""
        return any(rule.preconditioner is not None for rule in self._moved)

    @property
    def covers_all(self) -> bool:
        """The optimizer moves every tensor."""
        return None not in self.tensors

    @property
    def uniform(self) -> bool:
        """Every tensor is moved, and with one rate, one Γ and one decay of each kind."""
        return self.covers_all and self._one_setting

    @property
    def warmup(self) -> bool:
        """Some tensor's moments have not settled: an edge ratio above 1 is no edge of stability."""
        return any(rule.warmup for rule in self._moved)

    def threshold(self) -> float | None:
        """The sharpness, preconditioned where P ≠ 1, at which χ = 1: 2/η for gradient descent.

        None where no one number is: settings differ between tensors, coupled decay passes through a
        preconditioner, or, without one, some tensors that have curvature stand still. Infinite at a
        learning rate of 0.
        """
        line = self.edge_ratio_line()
        if line is None:
            return None
        slope, offset = line
        return (1 - offset) / slope if slope > 0 else math.inf

    def edge_ratio_line(self) -> tuple[float, float] | None:
        """(slope, offset) of χ = slope · sharpness + offset; None where `threshold()` is None.

        The sharpness is the preconditioned one, over the tensors that move, where P ≠ 1.
        """
        if not self._one_setting or not (self.preconditioned or self.covers_all):
            return None
        rule = self._moved[0]
        if self.preconditioned and rule.coupled_decay != 0:
            return None
        slope = rule.learning_rate * rule.gain / 2
        decay = rule.learning_rate * rule.decoupled_decay / 2
        return slope, slope * rule.coupled_decay + decay

    def decay_range(self) -> tuple[float, float] | None:
        """Least and largest of the tensors' ½(ηΓγ_c + ηγ_d), what their decay adds to χ.

        None where coupled decay passes through a preconditioner.
        """
        if any(r.coupled_decay != 0 and r.preconditioner is not None for r in self._moved):
            return None
        decays = [
            r.learning_rate * (r.gain * r.coupled_decay + r.decoupled_decay) / 2
            for r in self._moved
        ]
        return min(decays), max(decays)

    @property
    def _moved(self) -> tuple[TensorRule, ...]:
        return tuple(rule for rule in self.tensors if rule is not None)

    @property
    def _one_setting(self) -> bool:
        settings = {
            (r.learning_rate, r.gain, r.coupled_decay, r.decoupled_decay) for r in self._moved
        }
        return len(settings) == 1


def edge_operator(hessian: Operator, rule: UpdateRule) -> Operator:
    """A^½ (H + diag γ_c) A^½ + diag(ηγ_d): half its largest eigenvalue is χ.

    A product costs one of H. A tensor that stands still has zero rows.
    """
    step = _flat(rule, hessian, lambda r: _inverse(r) * (r.learning_rate * r.gain))
    coupled = _flat(rule, hessian, lambda r: r.coupled_decay)
    decoupled = _flat(rule, hessian, lambda r: r.learning_rate * r.decoupled_decay)
    return scaled(hessian, step.sqrt(), step * coupled + decoupled)


def preconditioned_operator(hessian: Operator, rule: UpdateRule) -> Operator:
    """P^-½ H P^-½: its largest eigenvalue is the preconditioned sharpness.

    A product costs one of H. A tensor that stands still has zero rows, as if its P were infinite.
    """
    return scaled(hessian, _flat(rule, hessian, _inverse).sqrt())


def _inverse(rule: TensorRule) -> Tensor | float:
    return 1.0 if rule.preconditioner is None else 1 / rule.preconditioner


def _flat(rule: UpdateRule, like: Operator, of: Callable[[TensorRule], Tensor | float]) -> Tensor:
    """One number for each of the operator's dimensions; 0 where the tensor stands still."""
    values = [0.0 if tensor is None else of(tensor) for tensor in rule.tensors]
    parts = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
    return torch.cat([p.reshape(-1).expand(n) for p, n in zip(parts, rule.sizes, strict=True)])
