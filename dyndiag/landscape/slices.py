"""The loss along a line and over a plane through the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Generator, Tensor, nn

from dyndiag.curvature.data import chosen_parameters
from dyndiag.curvature.draws import fixed_generator
from dyndiag.errors import DyndiagError
from dyndiag.landscape.along import Along, resolved
from dyndiag.landscape.checkpoints import Checkpoint
from dyndiag.landscape.components import PrincipalComponents, project
from dyndiag.landscape.directions import (
    Chosen,
    Direction,
    cosine,
    displacement,
    random_direction,
)
from dyndiag.landscape.fingerprints import digest
from dyndiag.landscape.progress import bar
from dyndiag.landscape.saved import Floats, measure
from dyndiag.landscape.surface import Surface

Range = tuple[float, float]

_MARGIN = 0.15
"""Room around a trajectory, as a share of its width."""


@dataclass(frozen=True)
class Line:
    """The loss along a line: L(θ + c·d)."""

    coordinates: Floats
    """(n,): c, ascending. The model itself is at 0."""
    losses: Floats
    """(n,): NaN and inf as they came."""
    label: str
    """What the direction is."""
    norm: float
    """‖d‖₂ over the parameters."""


@dataclass(frozen=True)
class Plane:
    """The loss over a plane: L(θ + x·d₁ + y·d₂)."""

    x: Floats
    """(n,), ascending."""
    y: Floats
    """(m,), ascending."""
    losses: Floats
    """(m, n): losses[j, i] is at (x[i], y[j]). NaN and inf as they came."""
    labels: tuple[str, str]
    """What the two directions are."""
    norms: tuple[float, float]
    """‖d₁‖₂ and ‖d₂‖₂."""
    cosine: float
    """Of the angle between the two; where it is not near 0, the picture is sheared."""
    trajectory: Floats | None
    """(k, 2): the point of the plane that is nearest to each checkpoint."""
    explained_variance: Floats | None
    """(2,), of principal components: the share of the checkpoints' variance along each."""


def line(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    along: Along | None = None,
    between: Range = (-1.0, 1.0),
    points: int = 51,
    generator: Generator | None = None,
    parameters: Chosen = None,
    eval_mode: bool = True,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Line:
    """The loss along a line through the model's weights: L(θ + c·d) at `points` values of c.

    `along`: the direction d as it is, such as `gradient_direction(…)`, `difference(…)`, the first
    of `curvature.eigenpairs(…)` or a flat tensor over the trainable parameters; without it
    `random_direction(model, generator=generator)`. At c = 0 the loss is the model's own, bit for
    bit; autocast is off unless `loss_fn` turns it on.

    `data`: a batch, or a DataLoader, whose batches are read once and kept; the loss is the mean
    over all examples, each batch weighing by its number of them. `micro_batch`, `reduction`, `size`
    and `parameters` as for `curvature.hessian`. `eval_mode=False` leaves the modules in their
    modes: with BatchNorm's batch statistics then, and one set of dropout masks for all points.

    `resume`: a file in which each finished point is kept, so that a run that was interrupted goes
    on from there to the same numbers; it is refused for another model, data, direction or grid.
    `progress` shows a bar where it takes longer than two seconds. Nothing of the model changes.

    Cost: `points` forward passes over the data (one more to resume), and a copy of the weights at
    each. Weights of 16 bits are rounded at each point: pass `model.float()` for a smooth line.

    Misleads: a random direction in a space of many dimensions is nearly orthogonal to the few in
    which the loss is sharp, so it shows the average curvature, tr H over the dimensions, and no
    saddle; compare with `along=eigenpairs`. Source of slices: Li et al. (2018), "Visualizing the
    loss landscape of neural nets".
    """
    surface = Surface(
        model,
        loss_fn,
        data,
        eval_mode=eval_mode,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
    )
    if along is None:
        along = random_direction(model, generator=generator, parameters=parameters)
    [direction] = resolved(along, 1, model, parameters)
    coordinates = grid(between, points)
    losses = _losses(
        surface, model, [direction], coordinates[:, None], parameters, resume, progress, "line"
    )
    return Line(coordinates, losses, direction.label, direction.norm)


def plane(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    along: Along | Sequence[Along] | None = None,
    between: Range | tuple[Range, Range] | None = None,
    points: int = 25,
    trajectory: Sequence[Checkpoint] | None = None,
    generator: Generator | None = None,
    parameters: Chosen = None,
    eval_mode: bool = True,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plane:
    """The loss over a plane through the model's weights: L(θ + x·d₁ + y·d₂), `points` a side.

    `along`: two directions, or what holds two (`curvature.eigenpairs(…, k=2)`,
    `principal_components(…)`, a tensor (2, P)); without it two random ones, filter-normalised one
    after the other, and not made orthogonal, which in many dimensions they nearly are. `between`:
    the range of both coordinates, or of each; without it (−1, 1), and as much more as the
    trajectory needs. At (0, 0), a point of the grid, the loss is the model's own, bit for bit.

    `trajectory`: checkpoints to draw into the plane, each at its nearest point there. Their losses
    are not those of the plane beneath them. Principal components bring their own.

    All else as for `line`. Cost: `points`² forward passes over the data.
    """
    surface = Surface(
        model,
        loss_fn,
        data,
        eval_mode=eval_mode,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
    )
    if along is None:
        generator = generator or fixed_generator()
        draws = [
            random_direction(model, generator=generator, parameters=parameters) for _ in range(2)
        ]
        along = [replace(d, label=f"{d.label} ({i + 1})") for i, d in enumerate(draws)]
    directions = resolved(along, 2, model, parameters)
    angle = cosine(*directions)
    if abs(angle) > 1 - 1e-6:
        raise DyndiagError("the two directions are parallel, so there is no plane: pass others")
    track = None
    if trajectory is not None:
        track = project(model, trajectory, directions, parameters, progress)
    elif isinstance(along, PrincipalComponents):
        track = along.coordinates
    x, y = (grid(range_, points) for range_ in _ranges(between, track, points))
    at = np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)
    losses = _losses(surface, model, directions, at, parameters, resume, progress, "plane")
    return Plane(
        x,
        y,
        losses.reshape(len(y), len(x)),
        (directions[0].label, directions[1].label),
        (directions[0].norm, directions[1].norm),
        angle,
        track,
        along.explained_variance if isinstance(along, PrincipalComponents) else None,
    )


def grid(between: Range, points: int) -> Floats:
    """Equally spaced, both ends included; what is zero but for rounding is zero."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise DyndiagError(f"points must be a whole number, 2 or more, but it is {points!r}")
    low, high = between
    if not (np.isfinite([low, high]).all() and low < high):
        raise DyndiagError(
            f"between must be two finite numbers, the lower first, but it is {between!r}"
        )
    found = np.linspace(low, high, points)
    found[np.abs(found) < 1e-9 * (high - low)] = 0.0
    return found


def _losses(
    surface: Surface,
    model: nn.Module,
    directions: Sequence[Direction],
    points: Floats,
    parameters: Chosen,
    resume: str | os.PathLike[str] | None,
    progress: bool,
    what: str,
) -> Floats:
    move = displacement(model, directions, parameters)

    def identity() -> dict[str, str]:
        moved = list(chosen_parameters(model, parameters))
        vectors = digest([moved, [d.vector for d in directions]])
        return {**surface.fingerprint(), "another direction": vectors}

    passes = surface.batches
    with bar(len(points) * passes, what, progress) as tick:

        def at(point: Floats) -> tuple[float, ...]:
            found = surface.read(lambda: move(point.tolist()), tick=lambda: tick(1))
            return (found.loss,)

        return measure(points, at, 1, resume, what, identity, lambda n: tick(n * passes))[:, 0]


def _ranges(
    between: Range | tuple[Range, Range] | None, track: Floats | None, points: int
) -> tuple[Range, Range]:
    if between is not None:
        low, high = between
        if isinstance(low, tuple | list) and isinstance(high, tuple | list):
            return low, high
        if isinstance(low, tuple | list) or isinstance(high, tuple | list):
            raise DyndiagError(f"between must be one range or two, but it is {between!r}")
        return (low, high), (low, high)
    if track is None:
        return (-1.0, 1.0), (-1.0, 1.0)
    found = [_around(track[:, i], points) for i in range(2)]
    return found[0], found[1]


def _around(values: Floats, points: int) -> Range:
    """Wide enough for all of them and for 0, which comes to lie on the grid."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    room = _MARGIN * (high - low) or 1.0
    low, high = low - room, high + room
    step = (high - low) / (points - 2) if points > 2 else high - low
    below = int(np.ceil(-low / step))
    return -below * step, (points - 1 - below) * step
