"""What may be passed as `along`: one direction or several, in any of their forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from dyndiag.curvature import Eigenpairs
from dyndiag.curvature.data import chosen_parameters
from dyndiag.errors import DyndiagError
from dyndiag.landscape.components import PrincipalComponents
from dyndiag.landscape.directions import Chosen, Direction

Along: TypeAlias = Direction | Tensor | Eigenpairs | PrincipalComponents


def resolved(
    along: Along | Sequence[Along], count: int, model: nn.Module, parameters: Chosen
) -> list[Direction]:
    """What was passed as `along`, as so many directions over these parameters, checked."""
    found = list(_listed(along))[:count]
    if len(found) < count:
        raise DyndiagError(
            f"a plane takes two directions, but along holds {len(found)}: "
            "pass two, or what holds two, such as eigenpairs(…, k=2)"
        )
    chosen = chosen_parameters(model, parameters)
    size = sum(p.numel() for p in chosen.values())
    for direction in found:
        _check(direction, size)
    return found


def _listed(along: Any, number: int = 1) -> Iterator[Direction]:
    if isinstance(along, PrincipalComponents):
        yield from along.directions
    elif isinstance(along, Eigenpairs):
        for value, vector in zip(along.values.tolist(), along.vectors, strict=True):
            yield Direction(vector, f"eigenvector of λ = {value:.4g}")
    elif isinstance(along, Direction):
        yield along
    elif isinstance(along, Tensor):
        for i, row in enumerate([along] if along.dim() == 1 else along):
            yield Direction(row, f"direction {number + i}")
    elif isinstance(along, list | tuple):
        for i, item in enumerate(along):
            yield from _listed(item, number + i)
    else:
        raise DyndiagError(
            "along must be a Direction, a flat tensor, Eigenpairs or PrincipalComponents, but it "
            f"is a {type(along).__name__}"
        )


def _check(direction: Direction, size: int) -> None:
    vector = direction.vector
    if vector.shape != (size,):
        raise DyndiagError(
            f"a direction has one number for each of the {size} trainable parameters, shape "
            f"({size},), but {direction.label!r} has shape {tuple(vector.shape)}"
        )
    norm = direction.norm
    if norm == 0:
        raise DyndiagError(
            f"{direction.label!r} is zero everywhere, so it leads nowhere: filter normalisation "
            "leaves parameters of one dimension where they are, pass along= for such a model"
        )
    if not np.isfinite(norm):
        raise DyndiagError(f"{direction.label!r} holds NaN or inf: look at the weights first")
