"""The straight path between two sets of weights, and the barrier on it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dyndiag.landscape.checkpoints import Checkpoint, State, check_apart, matched, of_model
from dyndiag.landscape.fingerprints import digest
from dyndiag.landscape.progress import bar
from dyndiag.landscape.saved import Floats, measure
from dyndiag.landscape.slices import grid
from dyndiag.landscape.surface import Surface, has_statistics


@dataclass(frozen=True)
class LinearPath:
    """The loss on the straight path from a to b: L((1−α)a + αb)."""

    alphas: Floats
    """(n,): from 0, which is a, to 1, which is b."""
    losses: Floats
    """(n,): NaN and inf as they came."""
    accuracies: Floats | None
    """(n,), 0…1, where the model gives class scores and the batches hold their classes."""
    recomputed_batchnorm: bool
    """Whether BatchNorm's running statistics were recomputed at each point."""

    @property
    def chord(self) -> Floats:
        """(n,): the straight line between the losses of a and b."""
        with np.errstate(invalid="ignore"):  # an infinite end gives NaN
            return (1 - self.alphas) * self.losses[0] + self.alphas * self.losses[-1]

    @property
    def heights(self) -> Floats:
        """(n,): the loss over the chord."""
        with np.errstate(invalid="ignore"):
            return self.losses - self.chord

    @property
    def barrier(self) -> float:
        """The greatest of the heights: 0 if the loss nowhere rises above that line.

        inf where the loss is inf on the way; NaN where it is NaN, or not finite at an end.
        """
        heights = self.heights
        return math.nan if np.isnan(heights).any() else float(heights.max())

    @property
    def barrier_at(self) -> float:
        """The α of the barrier; NaN without one."""
        return math.nan if math.isnan(self.barrier) else float(self.alphas[self.heights.argmax()])


def interpolate(
    model: nn.Module,
    a: Checkpoint,
    b: Checkpoint,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    points: int = 25,
    recompute_batchnorm: bool | None = None,
    eval_mode: bool = True,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LinearPath:
    """The loss on the straight path between two checkpoints, and the barrier on it.

    barrier = max over α in [0, 1] of L((1−α)a + αb) − [(1−α) L(a) + α L(b)], over `points` values
    of α: in the unit of the loss, at least 0, a lower bound of the maximum between the points.

    `a`, `b`: state dicts, modules or paths of files, with the names and shapes of `model`, which
    gives the architecture and keeps its own weights. Parameters and floating-point buffers are
    interpolated; whole numbers come from the nearer end. `recompute_batchnorm`: replace BatchNorm's
    running statistics at each point by those of the data, since the mean of two networks'
    statistics is not that of the network between them; by default where the model has any. The
    losses at the ends are then with recomputed statistics, too. Accuracy comes with it where the
    model gives scores (examples, classes) and a batch holds one whole number for each example.

    Other options as for `line`. Cost: `points` forward passes over the data, twice as many with
    recomputed statistics, and a copy of the weights at each.

    Misleads: two networks that are the same up to the order of their hidden units may have a high
    barrier; here none is permuted (Entezari et al. 2022, "The role of permutation invariance in
    linear mode connectivity"). Source: Frankle et al. (2020), "Linear mode connectivity and the
    lottery ticket hypothesis".
    """
    check_apart(a, b)
    ends = matched(a, model, "a"), matched(b, model, "b")
    surface = Surface(
        model,
        loss_fn,
        data,
        eval_mode=eval_mode,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
    )
    if recompute_batchnorm is None:
        recompute_batchnorm = eval_mode and any(map(has_statistics, model.modules()))
    targets = of_model(model)
    alphas = grid((0.0, 1.0), points)
    passes = surface.batches * (2 if recompute_batchnorm else 1)

    def identity() -> dict[str, str]:
        marks = surface.fingerprint()
        del marks["another model"]  # its weights are not on the path
        recomputed = digest(bool(recompute_batchnorm))
        return {
            **marks,
            "another pair of checkpoints": digest(list(ends)),
            "another setting of recompute_batchnorm": recomputed,
        }

    with bar(points * passes, "path", progress) as tick:

        def at(point: Floats) -> tuple[float, float]:
            return surface.read(
                lambda: _go(targets, *ends, float(point[0])),
                recompute_batchnorm=bool(recompute_batchnorm),
                with_accuracy=True,
                tick=lambda: tick(1),
            )

        found = measure(
            alphas[:, None], at, 2, resume, "path", identity, lambda n: tick(n * passes)
        )
    accuracies = None if np.isnan(found[:, 1]).all() else found[:, 1]
    return LinearPath(alphas, found[:, 0], accuracies, bool(recompute_batchnorm))


def _go(targets: State, a: State, b: State, alpha: float) -> None:
    """Writes (1−α)a + αb over the model."""
    for name, target in targets.items():  # .data: a graph that the user holds stays valid
        target.data.copy_(_between(a[name], b[name], alpha, target.device))


def _between(a: Tensor, b: Tensor, alpha: float, device: torch.device) -> Tensor:
    if alpha in (0.0, 1.0) or not (a.is_floating_point() or a.is_complex()):
        return a if alpha < 0.5 else b
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(device, wide), b.to(device, wide)
    # What is the same at both ends stays the same: −inf of an attention mask would become NaN.
    return torch.where(a == b, a, torch.lerp(a, b, alpha))
