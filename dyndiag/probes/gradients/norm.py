"""Gradient norms of the optimizer step, before clipping and after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dyndiag.probes.forward import Boundary, Hook, unguarded
from dyndiag.probes.modules import ModuleNorms, module_names
from dyndiag.probes.passing import PassingStep
from dyndiag.state import Measurements

_WATCH_ALL = 16
"""Steps: a loop that has not clipped by then does not, and is watched by less from there."""

_SHARE_OF = 100
"""Steps."""


class GradientNorm:
    """`gradients/norm` and `gradients/norm/<module>`: ‖g‖₂ of the averaged, unscaled gradient.

    Read when the optimizer is about to step, from `.grad`. By then a loop may have clipped it.
    That is noticed on a few small watched parameters: an in-place change after the backward pass
    moves their gradient's version, and how much their norm shrank tells the clip coefficient.
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
        self._steps, self._changes, self._alike = 0, 0, False
        self._watched = _few_small(parameters)
        position = {id(p): i for i, p in enumerate(parameters)}
        self._positions = [position[id(p)] for p in self._watched]
        self._seen: dict[int, tuple[int, Tensor | None]] = {}
        self._versions: set[int] = set()
        """That the first watched gradient had after the backward passes of the first steps."""
        self._hook = Hook(self._accumulated, self.name, boundary)
        self._handles: list[RemovableHandle] = []
        self._comparable = True
        self._clipped: Tensor | None = None
        self.coefficients: tuple[Tensor, ...] = ()
        """`gradients/clip_coefficient` of the step before and of this one, as far as known."""
        self._watch(all_of_them=True)

    def _watch(self, all_of_them: bool) -> None:
        self.detach()
        self._watches_all = all_of_them
        count = len(self._watched) if all_of_them else int(len(self._versions) > 1)
        self._handles = [
            p.register_post_accumulate_grad_hook(self._hook) for p in self._watched[:count]
        ]

    def _accumulated(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and not grad.is_sparse:
            copy = grad.detach().clone() if self._watches_all else None
            self._seen[id(parameter)] = (grad._version, copy)

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def measure(self, step: PassingStep) -> Measurements:
        """Norms of the gradients as they are now."""
        before, self.coefficients = self.coefficients[-1:], ()
        if not any(step.present):
            return {}
        self._steps += 1
        grads = [step.held[i] for i in self._positions]
        changed = self._changed(grads)
        shrunk = self._shrunk(grads) if changed else []
        self._seen.clear()
        if self._steps == _WATCH_ALL and not self._changes and not changed and self._comparable:
            self._watch(all_of_them=False)
        if not changed and step.norms_on_host is not None and all(step.present):
            return {self._all_names: self._norms.on_host(step.norms_on_host)}
        norms = self._norms.squares(step.gradient_norms, step.present).sqrt_()
        if not changed:
            return self._series(norms, step.present)
        self._changes += 1
        if not self._watches_all:  # the first change: there are no copies to compare with
            self._watch(all_of_them=True)
        if not shrunk:
            return {"gradients/norm_clipped": norms[0]}
        ratios = torch.stack([ratio.to(norms.device) for ratio in shrunk])
        if step.scale is None and (unscaled_by := _loss_scale()) is not None:
            ratios = ratios * unscaled_by.to(norms.device)
        coefficient = ratios.nanmedian()
        if not self._all_shrank_alike(ratios, coefficient):
            return {"gradients/norm_clipped": norms[0]}
        self.coefficients = (*before, coefficient.clamp(max=1))
        return {
            "gradients/norm_clipped": norms[0],
            "gradients/clip_coefficient": self.coefficients[-1],
            "gradients/clipped_share": self._clipped_share(coefficient),
            **self._series(norms / coefficient, step.present),
        }

    def _clipped_share(self, coefficient: Tensor) -> Tensor:
        if self._clipped is None:
            self._clipped = torch.full((_SHARE_OF,), torch.nan, device=coefficient.device)
        self._clipped[self._steps % _SHARE_OF] = coefficient < 1 - 1e-4
        return self._clipped.nanmean()

    def _all_shrank_alike(self, ratios: Tensor, coefficient: Tensor) -> bool:
        # How a loop clips does not change from step to step, so a GPU, where to look means to
        # wait, is asked at the first few changed steps and then now and then.
        if ratios.device.type == "cpu" or self._changes < 16 or self._changes % 101 == 0:
            alike = (ratios - coefficient).abs() <= 1e-4 * coefficient
            self._alike = bool((alike | ratios.isnan()).all() & coefficient.isfinite())
        return self._alike

    def _series(self, norms: Tensor, present: Sequence[bool]) -> Measurements:
        if all(present):
            return {self._all_names: norms}
        modules = {module for module, here in zip(self._owners, present, strict=True) if here}
        kept = [i for i, module in enumerate(self._norms.modules, 1) if module in modules]
        names = ("gradients/norm", *(f"gradients/norm/{self._norms.modules[i - 1]}" for i in kept))
        return {names: norms[[0, *kept]]}

    def _changed(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a watched gradient was changed in place after the backward pass.

        Each accumulation moves a gradient's version alike, so where one parameter is watched the
        others' versions are held against its own; and where that was the same at each of the first
        steps, none need be watched. Whether these hold here is seen beforehand. (A later step of
        more micro-batches looks changed then, once.)
        """
        if not self._watches_all:
            unseen = sys.maxsize if self._handles else max(self._versions)
            version, _ = self._seen.get(id(self._watched[0]), (unseen, None))
            return any(grad is not None and grad._version > version for grad in grads)
        here = [
            (grad._version, self._seen[id(p)][0])
            for p, grad in zip(self._watched, grads, strict=True)
            if grad is not None and id(p) in self._seen
        ]
        first = self._seen.get(id(self._watched[0]))
        self._comparable &= first is not None and all(after <= first[0] for _, after in here)
        if first is not None:
            self._versions.add(first[0])
        return any(now != after for now, after in here)

    def _shrunk(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Norm now over norm after the backward pass, of each watched gradient that was copied."""
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
        copies = [self._seen.get(id(p), (0, None))[1] for p in self._watched]
        return [
            norm(grad) / norm(copy)
            for grad, copy in zip(grads, copies, strict=True)
            if grad is not None and copy is not None
        ]


def _loss_scale() -> Tensor | None:
    """The scale of the GradScaler that takes this step; None without one.

    It divides the gradients by the scale before the step, and leaves no mark on them or the
    optimizer; but the step is taken from inside it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler._scale
        frame = frame.f_back
    return None


def _few_small(parameters: Sequence[nn.Parameter], count: int = 4) -> list[nn.Parameter]:
    """The smallest parameters of each quarter of the model: cheap to read, spread over it."""
    chosen: dict[int, nn.Parameter] = {}
    for quarter in range(count):
        low = quarter * len(parameters) // count
        high = max(low + 1, (quarter + 1) * len(parameters) // count)
        smallest = min(parameters[low:high], key=lambda p: p.numel(), default=None)
        if smallest is not None:
            chosen[id(smallest)] = smallest
    return list(chosen.values())
