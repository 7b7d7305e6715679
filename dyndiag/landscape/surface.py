"""The loss over the data as a function of the weights; looking at it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dyndiag.batches import check_scalar_loss
from dyndiag.curvature.data import fix_random_streams, number_of_examples, pieces
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace
from dyndiag.landscape.accuracy import hits, outputs_of, share_of
from dyndiag.landscape.fingerprints import digest

Place = Callable[[], None]
"""Writes other weights over those of the model."""

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Reading(NamedTuple):
    """What one set of weights gave."""

    loss: float
    accuracy: float
    """Share of right classes; NaN where not asked for, or without class scores and targets."""


class Surface:
    """L(θ): the loss over all of the data, at whatever weights are put in place.

    A reading depends on these weights alone: each begins from the model's own state and from the
    same random streams, which are put back after it, bit for bit, also on error or Ctrl-C.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        eval_mode: bool = True,
        micro_batch: int | None = None,
        reduction: str = "mean",
        size: Callable[[Any], int] | None = None,
    ) -> None:
        self.model, self.loss_fn, self.eval_mode = model, loss_fn, eval_mode
        self._graph = False
        with no_trace(model, loss_fn=loss_fn):
            if eval_mode:
                model.eval()
            fix_random_streams()  # a loader that shuffles gives the same batches in every process
            self._parts = pieces(
                model, loss_fn, data, micro_batch=micro_batch, reduction=reduction, size=size
            )
        if not self._parts:
            raise DyndiagError("the data holds no example that weighs anything: pass a batch")

    @property
    def batches(self) -> int:
        """Forward passes of a reading."""
        return len(self._parts)

    def read(
        self,
        place: Place,
        *,
        recompute_batchnorm: bool = False,
        with_accuracy: bool = False,
        tick: Place = lambda: None,
    ) -> Reading:
        """Loss and accuracy at the weights that `place` puts in. `tick` is called at each batch.

        Cost: one forward pass over the data without a graph (with one only if the loss is itself
        made of derivatives), two with `recompute_batchnorm`; a copy of the weights each way.
        """
        with self.standing(place):
            try:
                return self._read(recompute_batchnorm, with_accuracy, tick, graph=self._graph)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if self._graph:
                    raise
        with self.standing(place):
            found = self._read(recompute_batchnorm, with_accuracy, tick, graph=True)
        self._graph = True  # the loss is made of derivatives: it will always need them
        return found

    def slope(
        self, place: Place, parameters: Sequence[nn.Parameter], tick: Place = lambda: None
    ) -> tuple[float, list[Tensor]]:
        """The loss and its gradient by `parameters` there. Cost: one gradient over the data."""
        total = [torch.zeros_like(p, dtype=wide(p)) for p in parameters]
        losses = []
        with self.standing(place):
            for batch, weight in self._parts:
                loss = self._loss(batch)
                if not loss.requires_grad:
                    raise DyndiagError(
                        "the loss has no graph back to the parameters: compute it from the model's "
                        "output, without no_grad() or .detach()"
                    )
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
                for sum_, part in zip(total, gradient, strict=True):
                    if part is not None:
                        sum_.add_(part.to_dense() if part.is_sparse else part, alpha=weight)
                losses.append(loss.detach())
                tick()
        return self._mean(losses), total

    def fingerprint(self) -> dict[str, str]:
        """What a reading depends on, but for the loss function, which has no bytes to compare."""
        modes = [module.training and not self.eval_mode for module in self.model.modules()]
        return {
            "another model": digest(
                [dict(f()) for f in (self.model.named_parameters, self.model.named_buffers)]
            ),
            "another mode": digest(modes),
            "other data": digest(self._parts),
        }

    @contextmanager
    def standing(self, place: Place) -> Iterator[None]:
        """The model at other weights for a while, in its mode, with fixed random streams."""
        kernels = _kernels()
        with no_trace(self.model, loss_fn=self.loss_fn), sdpa_kernel(kernels):
            if self.eval_mode:
                self.model.eval()
            place()
            fix_random_streams()
            yield

    def _read(
        self, recompute_batchnorm: bool, with_accuracy: bool, tick: Place, *, graph: bool
    ) -> Reading:
        losses, found = [], []
        with torch.set_grad_enabled(graph):
            if recompute_batchnorm:
                self._recompute_batchnorm(tick)
                fix_random_streams()
            for batch, _ in self._parts:
                with outputs_of(self.model, wanted=with_accuracy) as outputs:
                    losses.append(self._loss(batch).detach())
                found.append(hits(outputs, batch))
                tick()
        return Reading(self._mean(losses), share_of(found))

    def _loss(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.model, batch)
        check_scalar_loss(loss)
        return loss.reshape(())

    def _mean(self, losses: Sequence[Tensor]) -> float:
        """Added up in float64; one batch's loss as it is. The one wait for the device."""
        values = torch.stack(list(losses)).tolist()
        return sum(w * loss for loss, (_, w) in zip(values, self._parts, strict=True))

    def _recompute_batchnorm(self, tick: Place) -> None:
        """Running statistics become the mean over the batches, each by its number of examples."""
        layers: list[Any] = [m for m in self.model.modules() if has_statistics(m)]
        sizes = [number_of_examples(batch) or 1 for batch, _ in self._parts]
        modes = [layer.training for layer in layers]
        for layer in layers:
            layer.running_mean.data.zero_()  # .data: a graph that the user holds stays valid
            layer.running_var.data.fill_(1)
            layer.train()
        seen = 0
        for (batch, _), size in zip(self._parts, sizes, strict=True):
            if size > 1 or max(sizes) == 1:  # one example alone has no variance
                seen += size
                for layer in layers:
                    layer.momentum = size / seen
                self._loss(batch)
            tick()
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)


def wide(tensor: Tensor) -> torch.dtype:
    """At least float32: what 16 bits are added up in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def has_statistics(module: nn.Module) -> Any:
    """Whether this is a BatchNorm layer that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _kernels() -> list[SDPBackend]:
    """The attention kernels that the user allows: the guard allows only what has two derivatives,
    and another kernel's loss is the same only up to rounding."""
    cuda = torch.backends.cuda
    allowed = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, is_allowed in allowed.items() if is_allowed] or [SDPBackend.MATH]
