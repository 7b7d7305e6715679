"""The angles between a step's gradient, the one before it, the weights and the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndiag.probes.by_module import ByModule, by_module
from dyndiag.probes.flat import dots
from dyndiag.probes.passing import PassingStep, StepSchedule
from dyndiag.state import Measurements


@dataclass(frozen=True)
class Pairs:
    """Two consecutive steps, every n-th.

    >>> [step for step in range(30) if Pairs(11).due(step)]
    [0, 1, 11, 12, 22, 23]
    """

    n: int = 11

    def due(self, step: int) -> bool:
        return step % self.n < 2


@dataclass
class _Kept:
    """A gradient, for the next step to compare with."""

    step: int
    parameters: tuple[nn.Parameter, ...]
    gradients: list[Tensor | None]
    norm: Tensor


class Cosines:
    """Cosines of a step's gradient g, over all trainable parameters, as the optimizer uses it.

    - `gradients/cosine_previous`: cos(g_t, g_{t−1}), where the step before was due, too. Near −1
      where the iterate hops across a valley (at the edge of stability), near 0 between
      uncorrelated minibatches, near 1 on a slope.
    - `gradients/nlm_cosine`, `…/<module>`: cos(−g, θ), θ before the step, and
      `gradients/nlm_share`, its square: the share of ‖g‖² along the direction of naive loss
      minimisation (Prieto et al. 2025), which only scales the weights. In a network homogeneous in
      its weights, such as one of ReLUs without biases, that is to scale the logits; biases and
      normalisation layers make it approximate. A gradient that is all along θ once the training
      data are learned lowers the loss and learns nothing.
    - `updates/cosine_descent`: cos(Δθ, −g) of the true change, decay included. 1 for plain
      gradient descent; low for an optimizer whose state has come apart from the gradient.

    Range: −1…1, share 0…1; NaN where one of the two is zero. Cost: six reads of gradients or
    weights, and two copies, .6 % of the time of a GPT of 1 M parameters; a copy of the gradient is
    held from the first step of a pair to the second, one of the weights during the second. By
    default at two consecutive steps every 11th: the first is only copied. Absent where a gradient
    is sparse. Where a closure computes the gradients inside the step, only `cosine_previous` is
    there. Misleads in float32 gradients below 1e-19, whose squares are lost.
    """

    name = "Cosines"

    def __init__(self, due: StepSchedule | None = None) -> None:
        self.due = due or Pairs()
        self.notices: list[str] = []
        self._kept: _Kept | None = None
        self._before: list[Tensor] | None = None
        self._read = False
        self._layout: ByModule | None = None
        self._which: ByModule | None = None

    def before(self, step: PassingStep) -> Measurements:
        self._read, self._before = True, None
        which = self._begin(step)
        if which is None:
            return {}
        seen = self._with_previous(step, which)
        if seen or not self.due.due(step.step + 1):  # else the first of a pair
            seen |= _with_weights(step, which)
            self._before = [p.clone() for p in _with_gradient(step)]
        self._keep(step, which)
        return seen

    def after(self, step: PassingStep) -> Measurements:
        read, self._read = self._read, False
        before, self._before = self._before, None
        which = self._which
        if not read:  # a closure has computed the gradients
            which = self._begin(step)
            seen = {} if which is None else self._with_previous(step, which)
            if which is not None:
                self._keep(step, which)
            return seen
        if before is None or which is None:
            return {}
        torch._foreach_sub_(before, _with_gradient(step))
        gradients = [g for g in step.gradients if g is not None]
        norm = _norm(step, which)
        product = dots(before, gradients, norm.device).sum()
        length = dots(before, before, norm.device).sum().sqrt()
        return {"updates/cosine_descent": _cosine(product, length * norm)}

    def _begin(self, step: PassingStep) -> ByModule | None:
        """Which parameters have a gradient; None where nothing can be measured."""
        self._which = None
        if any(g is not None and g.is_sparse for g in step.gradients):
            self._kept = None
            self.notices.append(
                "no cosines of the gradient: some gradients are sparse; those of an embedding "
                "with sparse=False are not"
            )
        elif any(step.present):
            device = step.gradient_norms.device
            self._which = by_module(self._layout, step.names, step.present, device)
            self._layout = self._which
        return self._which

    def _keep(self, step: PassingStep, which: ByModule) -> None:
        self._kept = None
        if self.due.due(step.step + 1):
            copies = [None if g is None else g.detach().clone() for g in step.gradients]
            self._kept = _Kept(step.step, step.parameters, copies, _norm(step, which))

    def _with_previous(self, step: PassingStep, which: ByModule) -> Measurements:
        kept, self._kept = self._kept, None
        if kept is None or kept.step != step.step - 1 or not _same(kept.parameters, step):
            return {}
        both = [
            (g, h)
            for g, h in zip(step.gradients, kept.gradients, strict=True)
            if g is not None and h is not None
        ]
        norm = _norm(step, which)
        product = dots([g for g, _ in both], [h for _, h in both], norm.device).sum()
        return {"gradients/cosine_previous": _cosine(product, norm * kept.norm.to(norm.device))}


def _with_weights(step: PassingStep, which: ByModule) -> Measurements:
    device = step.gradient_norms.device
    weights = _with_gradient(step)
    gradients = [g for g in step.gradients if g is not None]
    along = which.over(dots(gradients, weights, device), "sum")
    sizes = which.over(dots(weights, weights, device), "sum").sqrt()
    norms = which.over(which.kept(step.gradient_norms).square(), "sum").sqrt()
    cosine = _cosine(-along, norms * sizes)
    names = which.names("gradients/nlm_cosine") + which.names("gradients/nlm_share")
    return {names: torch.cat((cosine, cosine.square()))}


def _cosine(product: Tensor, norms: Tensor) -> Tensor:
    # Rounding would take parallel vectors a little above 1.
    return (product / norms).clamp(-1, 1)


def _norm(step: PassingStep, which: ByModule) -> Tensor:
    return torch.linalg.vector_norm(which.kept(step.gradient_norms))


def _with_gradient(step: PassingStep) -> list[Tensor]:
    return [p.detach() for p, here in zip(step.parameters, step.present, strict=True) if here]


def _same(parameters: tuple[nn.Parameter, ...], step: PassingStep) -> bool:
    return len(parameters) == len(step.parameters) and all(
        p is q for p, q in zip(parameters, step.parameters, strict=True)
    )
