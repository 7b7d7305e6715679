"""Gradient norms of the optimizer step, before clipping and after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndiag.probes.forward import Boundary, unguarded
from dyndiag.probes.gradients.clipping import ClipWatch
from dyndiag.probes.modules import ModuleNorms, module_names
from dyndiag.probes.passing import PassingStep
from dyndiag.state import Measurements

_SHARE_OF = 100
"""Steps."""


class GradientNorm:
    """`gradients/norm` and `gradients/norm/<module>`: ‖g‖₂ of the averaged, unscaled gradient.

    Read when the optimizer is about to step, from `.grad`. By then a loop may have clipped it.
    That is noticed on a few small watched parameters (`ClipWatch`): an in-place change after the
    backward pass moves their gradient's version, and how much their norm shrank tells the clip
    coefficient.
    If all of them shrank alike, `gradients/norm` is the norm before (exact to rounding, since
    clipping by norm multiplies by one number) and `gradients/norm_clipped` the one after, with
    `gradients/clip_coefficient` min(1, τ/‖g‖), their ratio (clipping removed the rest to 1), and
    `gradients/clipped_share`, the share of the last 100 steps where it was below 1; if not
    (clipping by value or by group), only `gradients/norm_clipped` is known.

    What a loss scaler multiplied the loss by is divided out.

    Cost: one read of the gradients, no pass, no host sync.
    """

    name = "GradientNorm"

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        boundary: Boundary = unguarded,
    ) -> None:
        self._owners = module_names(names)
        self._norms = ModuleNorms(names)
        self._all_names = ("gradients/norm", *(f"gradients/norm/{m}" for m in self._norms.modules))
        self._clips = ClipWatch(parameters, boundary)
        self._steps = 0
        self._clipped: Tensor | None = None
        self.coefficients: tuple[Tensor, ...] = ()
        """`gradients/clip_coefficient` of the step before and of this one, as far as known."""

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        self._clips.detach()

    @torch.no_grad()
    def measure(self, step: PassingStep) -> Measurements:
        """Norms of the gradients as they are now."""
        before, self.coefficients = self.coefficients[-1:], ()
        if not any(step.present):
            return {}
        self._steps += 1
        changed, coefficient = self._clips.look(step)
        norms: Tensor | list[float]
        if step.norms_on_host is not None and all(step.present):
            norms = self._norms.on_host(step.norms_on_host)
        else:
            norms = self._norms.squares(step.gradient_norms, step.present).sqrt_()
        if not changed:
            return self._series(norms, step.present)
        if coefficient is None:
            return {"gradients/norm_clipped": norms[0]}
        if isinstance(norms, list):
            if not (factor := coefficient.item()):  # made zero: what was before is lost
                return {"gradients/norm_clipped": norms[0]}
            unclipped: Tensor | list[float] = [norm / factor for norm in norms]
        else:
            unclipped = norms / coefficient.to(norms.device)
        self.coefficients = (*before, coefficient.clamp(max=1))
        return {
            "gradients/norm_clipped": norms[0],
            "gradients/clip_coefficient": self.coefficients[-1],
            "gradients/clipped_share": self._clipped_share(coefficient),
            **self._series(unclipped, step.present),
        }

    def _clipped_share(self, coefficient: Tensor) -> Tensor:
        if self._clipped is None:
            self._clipped = torch.full((_SHARE_OF,), torch.nan, device=coefficient.device)
        self._clipped[self._steps % _SHARE_OF] = coefficient < 1 - 1e-4
        return self._clipped.nanmean()

    def _series(self, norms: Tensor | list[float], present: Sequence[bool]) -> Measurements:
        if isinstance(norms, list) or all(present):
            return {self._all_names: norms}
        modules = {module for module, here in zip(self._owners, present, strict=True) if here}
        kept = [i for i, module in enumerate(self._norms.modules, 1) if module in modules]
        names = ("gradients/norm", *(f"gradients/norm/{self._norms.modules[i - 1]}" for i in kept))
        return {names: norms[[0, *kept]]}
