"""Gradient norms of the optimizer step, before clipping and after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn

from dyndiag.probes.forward import Boundary, Hook, unguarded
from dyndiag.probes.modules import ModuleNorms, module_names
from dyndiag.state import Measurements


class GradientNorm:
    """`gradients/norm` and `gradients/norm/<module>`: ‖g‖₂ of the averaged, unscaled gradient.

    Read when the optimizer is about to step, from `.grad`. By then a loop may have clipped it.
    That is noticed on a few small watched parameters: an in-place change after the backward pass
    moves their gradient's version, and how much their norm shrank tells the clip coefficient.
    If all of them shrank alike, `gradients/norm` is the norm before (exact to rounding, since
    clipping by norm multiplies by one number) and `gradients/norm_clipped` the one after; if not
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
        self._parameters = tuple(parameters)
        self._owners = module_names(names)
        self._norms = ModuleNorms(names)
        self._all_names = ("gradients/norm", *(f"gradients/norm/{m}" for m in self._norms.modules))
        self._steps, self._changes, self._alike = 0, 0, False
        self._watched = _few_small(self._parameters)
        self._seen: dict[int, tuple[int, Tensor | None]] = {}
        hook = Hook(self._accumulated, self.name, boundary)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._watched]

    def _accumulated(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and not grad.is_sparse:
            # A loop that has not clipped by now does not: the version alone is looked at then.
            may_clip = self._changes or self._steps < 16
            copy = grad.detach().clone() if may_clip else None
            self._seen[id(parameter)] = (grad._version, copy)

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def measure(self, grad_scale: Tensor | None = None) -> Measurements:
        """Norms of the gradients as they are now; `grad_scale` divides them (fused optimizers)."""
        grads = [p.grad for p in self._parameters]
        present = [grad is not None for grad in grads]
        if not any(present):
            return {}
        self._steps += 1
        norms = self._norms.squares(grads).sqrt()
        if grad_scale is not None:
            norms = norms / grad_scale.to(norms.device)
        shrunk = self._shrunk()
        self._seen.clear()
        if shrunk is None:
            return self._series(norms, present)
        if not shrunk:
            self._changes += 1
            return {"gradients/norm_clipped": norms[0]}
        ratios = torch.stack([ratio.to(norms.device) for ratio in shrunk])
        if grad_scale is None and (unscaled_by := _loss_scale()) is not None:
            ratios = ratios * unscaled_by.to(norms.device)
        coefficient = ratios.nanmedian()
        if not self._all_shrank_alike(ratios, coefficient):
            return {"gradients/norm_clipped": norms[0]}
        return {"gradients/norm_clipped": norms[0], **self._series(norms / coefficient, present)}

    def _all_shrank_alike(self, ratios: Tensor, coefficient: Tensor) -> bool:
        # How a loop clips does not change from step to step, so a GPU, where to look means to
        # wait, is asked at the first few changed steps and then now and then.
        if ratios.device.type == "cpu" or self._changes < 16 or self._changes % 101 == 0:
            alike = (ratios - coefficient).abs() <= 1e-4 * coefficient
            self._alike = bool((alike | ratios.isnan()).all() & coefficient.isfinite())
        self._changes += 1
        return self._alike

    def _series(self, norms: Tensor, present: Sequence[bool]) -> Measurements:
        if all(present):
            return {self._all_names: norms}
        modules = {module for module, here in zip(self._owners, present, strict=True) if here}
        kept = [i for i, module in enumerate(self._norms.modules, 1) if module in modules]
        names = ("gradients/norm", *(f"gradients/norm/{self._norms.modules[i - 1]}" for i in kept))
        return {names: norms[[0, *kept]]}

    def _shrunk(self) -> list[Tensor] | None:
        """Norm now over norm after the backward pass, of each watched gradient of which a copy is
        there, if one of them was changed in place since; None if none was."""
        here = [(p.grad, *self._seen[id(p)]) for p in self._watched if id(p) in self._seen]
        if not any(grad is not None and grad._version != version for grad, version, _ in here):
            return None
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
        return [
            norm(grad) / norm(copy)
            for grad, _, copy in here
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
