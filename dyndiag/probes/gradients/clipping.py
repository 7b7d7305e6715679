"""Whether a loop changed the gradients after its backward pass, and by how much."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dyndiag.probes.forward import Boundary, Hook, unguarded
from dyndiag.probes.passing import PassingStep

_FIRST = 16
"""Steps: a loop that has not clipped by then does not, one that clips by norm goes on to; each is
watched by less from there."""
_LOOK_AGAIN = 101
"""Changed steps after which it is seen anew whether all gradients shrink alike."""


class ClipWatch:
    """A few small watched parameters, whose gradients an in-place change after the backward pass
    moves on in version, and shrinks.

    A loop that shrank all of them alike in 16 steps clips by norm, and one is watched from there;
    where it begins to clip otherwise that is noticed within 101 clipped steps, and until then the
    coefficient is wrong.

    Cost, while it is not yet known how the loop clips: a hook and a norm for each of four small
    parameters; later for one, and where nothing clips mostly for none. No host sync but at some
    changed steps of the first, and of every 101.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], boundary: Boundary = unguarded) -> None:
        self._watched = _few_small(parameters)
        position = {id(p): i for i, p in enumerate(parameters)}
        self._positions = [position[id(p)] for p in self._watched]
        self._hook = Hook(self._accumulated, "GradientNorm", boundary)
        self._handles: list[RemovableHandle] = []
        self._seen: dict[int, tuple[int, Tensor | None]] = {}
        """Version and norm of the gradients, after the backward pass."""
        self._versions: set[int] = set()
        """That the first watched gradient had after the backward passes of the first steps."""
        self._steps, self._changes, self._alike, self._shrank_alike = 0, 0, False, 0
        self._comparable = True
        self._watch(len(self._watched))

    def _watch(self, count: int, norms: bool = True) -> None:
        self.detach()
        self._all, self._norms = norms and count == len(self._watched), norms
        self._handles = [
            p.register_post_accumulate_grad_hook(self._hook) for p in self._watched[:count]
        ]

    def _accumulated(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and not grad.is_sparse:
            self._seen[id(parameter)] = (grad._version, _norm(grad) if self._norms else None)

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def look(self, step: PassingStep) -> tuple[bool, Tensor | None]:
        """Whether the gradients were changed after the backward pass; and if so what all of them
        were multiplied by, 0-d, float64, or None where that is not known to be one number."""
        self._steps += 1
        grads = [step.held[i] for i in self._positions]
        changed = self._changed(grads)
        ratios = self._ratios(grads) if changed else []
        self._seen.clear()
        if not changed:
            if self._steps == _FIRST and not self._changes and self._comparable:
                self._watch(int(len(self._versions) > 1), norms=False)
            return False, None
        self._changes += 1
        if not ratios:  # the first change, or the one parameter that was watched had no gradient
            self._watch(len(self._watched))
            return True, None
        if step.scale is None and (unscaled_by := _loss_scale()) is not None:
            ratios = [ratio * unscaled_by.to(ratio.device) for ratio in ratios]
        coefficient = self._common(ratios)
        if self._changes % _LOOK_AGAIN == 0:
            self._watch(len(self._watched))
        elif self._shrank_alike >= _FIRST and self._comparable and len(self._handles) > 1:
            self._watch(1)
        return True, coefficient

    def _common(self, ratios: list[Tensor]) -> Tensor | None:
        """The one number, if it is one."""
        if not self._all:
            return None if ratios[0].is_cpu and not ratios[0].isfinite() else ratios[0]
        device = ratios[0].device
        together = torch.stack([ratio.to(device) for ratio in ratios])
        coefficient = together.nanmedian()
        # How a loop clips does not change from step to step, so a GPU, where to look means to
        # wait, is asked at the first few changed steps and then now and then.
        if device.type == "cpu" or self._changes <= _FIRST or self._changes % _LOOK_AGAIN < 2:
            near = (together - coefficient).abs() <= 1e-4 * coefficient
            self._alike = bool((near | together.isnan()).all() & coefficient.isfinite())
            # That nothing shrank tells nothing about how the loop clips.
            shrank = self._alike and bool(together[0] < 1 - 1e-4)
            self._shrank_alike = self._shrank_alike + shrank if self._alike else 0
        return coefficient if self._alike else None

    def _changed(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a watched gradient was changed in place after the backward pass.

        Each accumulation moves a gradient's version alike, so where one parameter is watched the
        others' versions are held against its own; and where that was the same at each of the first
        steps, none need be watched. Whether these hold here is seen beforehand. (A later step of
        more micro-batches looks changed then, once.)
        """
        if not self._all:
            unseen = -1 if self._norms else sys.maxsize
            if not self._handles:
                unseen = max(self._versions)
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

    def _ratios(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Norm now over norm after the backward pass, of each gradient where that was taken."""
        before = [self._seen.get(id(p), (0, None))[1] for p in self._watched]
        return [
            _norm(grad) / norm
            for grad, norm in zip(grads, before, strict=True)
            if grad is not None and norm is not None
        ]


def _norm(grad: Tensor) -> Tensor:
    grad = grad.detach()
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    exact = torch.float32 if grad.device.type == "mps" else torch.float64  # MPS has no float64
    return torch.linalg.vector_norm(values, dtype=exact)


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
