"""Whether a small change of the weights grows while they are trained: the butterfly effect."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from dyndiag.curvature.data import chosen_parameters
from dyndiag.curvature.draws import fixed_generator
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace
from dyndiag.landscape.distances import parameter_distance
from dyndiag.landscape.paths import LinearPath, interpolate
from dyndiag.landscape.progress import bar
from dyndiag.landscape.saved import Floats

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Butterfly:
    """Copies of a network that began beside it, after the same training."""

    start: float
    """ε‖θ‖₂: how far each copy was from the original before training."""
    distances: Floats
    """(copies,): ‖θ' − θ‖₂ after it."""
    paths: tuple[LinearPath, ...]
    """From the trained original to each trained copy: barriers are in them."""

    @property
    def growth(self) -> Floats:
        """(copies,): the distance after training over that before; NaN where both are 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.distances / self.start

    @property
    def barriers(self) -> Floats:
        """(copies,): the loss barrier between the original and each copy."""
        return np.array([path.barrier for path in self.paths])


def butterfly(
    model: Model,
    train: Callable[[Model], Any],
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    relative: float = 1e-3,
    copies: int = 1,
    generator: Generator | None = None,
    micro_batch: int | None = None,
    progress: bool = True,
) -> Butterfly:
    """Train the network and copies of it moved by ε‖θ‖, on the same data: how far do they part?

    `train(model)` trains what it is given, in place, with an optimizer of its own; it is called for
    the original's copy and for each moved copy, every time with the same global random streams.
    Each copy starts at θ + ε‖θ‖ u, ε = `relative`, u a Gaussian direction of unit length over the
    trainable parameters. Distances are over the parameters, barriers of `loss_fn` over `data`, as
    `interpolate` gives them. The model itself, and the random streams, stay as they are. While it
    trains, compiled modules run eagerly and attention by its math kernel.

    Cost: `copies` + 1 trainings, and 25 forward passes over the data for each copy (50 with
    BatchNorm); memory for two networks more.

    Misleads: what differs between two calls of `train` for other reasons (a loader's own generator
    or workers, kernels without a fixed order) parts the copies, too: with `relative=0` the
    distances must be 0.

    Source: Kwok et al. (2025), "The butterfly effect: neural network training trajectories are
    highly sensitive to initial conditions".
    """
    if not 0 <= relative < math.inf:
        raise DyndiagError(f"relative must be a finite number, 0 or more, but it is {relative!r}")
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise DyndiagError(f"copies must be a whole number, 1 or more, but it is {copies!r}")
    generator = generator or fixed_generator()
    distances, paths, start = [], [], 0.0
    with bar(copies + 1, "butterfly", progress, unit="training") as tick:
        original = _trained(copy.deepcopy(model), train)
        tick(1)
        for _ in range(copies):
            moved = copy.deepcopy(model)
            start = _move(moved, relative, generator)
            _trained(moved, train)
            distances.append(parameter_distance(original, moved).l2)
            paths.append(
                interpolate(
                    moved,
                    original,
                    moved,
                    loss_fn,
                    data,
                    micro_batch=micro_batch,
                    progress=False,
                )
            )
            tick(1)
    return Butterfly(start, np.array(distances), tuple(paths))


def _trained(model: Model, train: Callable[[Model], Any]) -> Model:
    """Trained with the global random streams as they are, and put back."""
    with no_trace(nn.Identity(), loss_fn=train):
        train(model)
    return model


def _move(model: nn.Module, relative: float, generator: Generator) -> float:
    """By relative · ‖θ‖ in a random direction; how far that is."""
    parameters = list(chosen_parameters(model).values())
    draws = [
        torch.randn(p.shape, generator=generator, device=generator.device).to(p.device)
        for p in parameters
    ]
    length, norm = (
        math.sqrt(sum(float(t.detach().float().square().sum()) for t in tensors))
        for tensors in (draws, parameters)
    )
    for p, draw in zip(parameters, draws, strict=True):
        p.data.copy_(p.data + relative * norm / length * draw)
    return relative * norm
