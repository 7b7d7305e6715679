"""The gradient against the second moment that an Adam-like optimizer divides it by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dyndiag.probes.by_module import ByModule, by_module
from dyndiag.probes.flat import Largest, blocks, sums
from dyndiag.probes.gradients.second_moment import SecondMoment, second_moment
from dyndiag.probes.passing import PassingStep, StepSchedule
from dyndiag.schedule import Every
from dyndiag.state import Measurements

_ONE_IN = 1000
"""One element in so many lies above the 99.9th percentile."""


class AdamMoments:
    """Where gradients have outgrown the second moment v that they are divided by.

    g: the gradient as the optimizer uses it. Per element, over all of them:

    - `gradients/spike_ratio_max`, `…/<module>`: the largest g²/v̂, with v before this step and
      v̂ = v / (1 − β₂ᵗ), its mean over the steps before. SPAM's rule (Huang et al. 2025) cuts
      elements at which g²/v, not corrected, is above 5,000 (2,000 by default in its code).
    - `gradients/spike_ratio_p999`: their 99.9th percentile, the smallest ratio that at most one
      element in 1,000 exceeds. Exact, by selection. An element that has had no gradient yet (v = 0)
      counts as 0 in both.

    Per tensor, the worst one and, per module, its worst:

    - `gradients/rms_ratio`, `…/<module>`: √mean(g² / max(v̂, ε²)), v after this step, about 1 for
      gradients as they were (Wortsman et al. 2023, StableAdamW). Above 2.3 v is too small for g:
      loss spikes have followed within 8 steps.
    - `gradients/epsilon_share`, `…/<module>`: mean of √v̂ / (√v̂ + ε) over elements with v > 0,
      the smallest one. 1 where ε does nothing, .5 where √v̂ = ε, near 0 where the update vanishes.
    - `gradients/rms`, `…/<module>`: RMS of g, what ε is to be small beside.

    For Adam, AdamW, NAdam, RAdam, RMSprop, and Adamax with u² for v; fused, foreach, capturable.
    What is divided by in the per-tensor ratios is what the optimizer divides by: AMSGrad's
    largest v, RMSprop's without correction (so that its first ratios are 1/√(1−α)), and for
    Adamax and centred RMSprop, which divide by something else, they are absent. Where a closure
    computes the gradients inside the step, the spike ratios are. Without a second moment there is
    nothing, which is told once.

    Range: ratios ≥ 0, share 0…1. Cost: two reads of the gradients and of v, in blocks of a million
    elements: 9 % of a step of a GPT of 1 M parameters, .8 % by default, every 11th. A spike of
    one step is then mostly not seen; `Every(1)` sees it. Misleads: in rarely used embeddings g²/v
    is large whenever a token comes; weights without effect on the loss, such as a bias before
    BatchNorm or of attention's keys, have gradients of rounding errors and a small `epsilon_share`
    (look at the modules); coupled weight decay is in v, but not in g.
    """

    name = "AdamMoments"

    def __init__(self, due: StepSchedule | None = None) -> None:
        self.due = due or Every(11)
        self.notices: list[str] = []
        self._spiking: ByModule | None = None
        self._divided: ByModule | None = None
        self._present: ByModule | None = None
        self._sizes: tuple[ByModule, Tensor] | None = None

    def before(self, step: PassingStep) -> Measurements:
        found = _moments(step)
        if not any(found):
            return {}
        device = step.gradient_norms.device
        elements = sum(_numbers(one.gradient) for one in found if one)
        largest = Largest(elements // _ONE_IN + 1, device)
        highest = []
        for one in found:
            if one:
                parts = []
                for ratio in _spike_ratios(*one):
                    parts.append(ratio.amax())
                    largest.add(ratio)
                most = parts[0] if len(parts) == 1 else torch.stack(parts).amax()
                highest.append(most.to(device))
        which = self._spiking = by_module(
            self._spiking, step.names, [one is not None for one in found], device
        )
        return {
            which.names("gradients/spike_ratio_max"): which.over(torch.stack(highest), "largest"),
            "gradients/spike_ratio_p999": largest.smallest(),
        }

    def after(self, step: PassingStep) -> Measurements:
        found = _moments(step)
        if not any(found):
            if any(step.present):
                self.notices.append(_nothing_to_divide(step))
            return {}
        seen = self._rms(step)
        found = [one if one and one.moment.divisor is not None else None for one in found]
        if not any(found):
            return seen
        device = step.gradient_norms.device
        against = [_against_divisor(*one) for one in found if one]
        squares, shares, counts = (sums(parts, device) for parts in zip(*against, strict=True))
        shares = torch.where(counts == 0, torch.inf, shares / counts)
        which = self._divided = by_module(
            self._divided, step.names, [one is not None for one in found], device
        )
        least = which.over(shares, "smallest")
        seen[which.names("gradients/rms_ratio")] = which.over(squares.sqrt(), "largest")
        seen[which.names("gradients/epsilon_share")] = torch.where(least.isinf(), torch.nan, least)
        return seen

    def _rms(self, step: PassingStep) -> Measurements:
        norms = step.gradient_norms
        which = self._present = by_module(self._present, step.names, step.present, norms.device)
        if self._sizes is None or self._sizes[0] is not which:
            sizes = torch.tensor([_numbers(p) for p in step.parameters], device=norms.device)
            self._sizes = which, which.over(which.kept(sizes).double(), "sum")
        squares = which.over(which.kept(norms).square(), "sum")
        return {which.names("gradients/rms"): (squares / self._sizes[1]).sqrt()}


def _nothing_to_divide(step: PassingStep) -> str:
    if any(gradient is not None and gradient.is_sparse for gradient in step.gradients):
        return (
            "no spike ratios: the gradients that the optimizer divides by a second moment are "
            "sparse; those of an embedding with sparse=False are not"
        )
    return (
        f"{type(step.optimizer).__name__} keeps no second moment of the gradients that is known, "
        "so there are no spike ratios: Adam, AdamW, NAdam, RAdam, Adamax and RMSprop do"
    )


class _Moment(NamedTuple):
    gradient: Tensor
    moment: SecondMoment


def _moments(step: PassingStep) -> list[_Moment | None]:
    """Gradient and second moment of each parameter that has both."""
    groups = {id(p): group for group in step.optimizer.param_groups for p in group["params"]}
    found: list[_Moment | None] = []
    for p, gradient in zip(step.parameters, step.gradients, strict=True):
        group = groups.get(id(p))
        usable = group is not None and gradient is not None and not gradient.is_sparse
        if not usable or gradient is None or group is None or gradient.numel() == 0:
            found.append(None)
            continue
        moment = second_moment(step.optimizer, group, p)
        found.append(None if moment is None else _Moment(gradient, moment))
    return found


def _numbers(tensor: Tensor) -> int:
    """Elements; a complex one counts as two, as Adam has it."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _spike_ratios(gradient: Tensor, moment: SecondMoment) -> Iterator[Tensor]:
    """g²/v̂ of each element, in blocks; 0 where v is 0."""
    for g, v in blocks(gradient, moment.mean):
        v = v.square() if moment.is_maximum else v
        yield _without_infinity(v.reciprocal()).mul_(g).mul_(g).mul_(moment.weight)


def _against_divisor(
    gradient: Tensor, moment: SecondMoment
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """By blocks: squares that add up to the RMS ratio's; shares that are not ε; how many shares."""
    assert moment.divisor is not None
    squares, shares, counts = [], [], []
    for g, v in blocks(gradient, moment.divisor):
        root, floor = v.sqrt(), moment.floor
        counts.append(root.sign().sum())
        shares.append(_without_infinity((root + floor).reciprocal_()).mul_(root).sum())
        ratio = _without_infinity(root.clamp_min_(floor).reciprocal_()).mul_(g)
        squares.append(torch.dot(ratio, ratio) * (moment.correction / _numbers(gradient)))
    return squares, shares, counts


def _without_infinity(inverse: Tensor) -> Tensor:
    """0 in place of 1/0. (Half the time of a mask.)"""
    return inverse.nan_to_num_(nan=torch.nan, posinf=0.0)
