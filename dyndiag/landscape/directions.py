"""Directions in the space of the weights: flat vectors over the trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor, nn

from dyndiag.curvature.data import chosen_parameters
from dyndiag.curvature.draws import fixed_generator
from dyndiag.errors import DyndiagError
from dyndiag.landscape.checkpoints import Checkpoint, matched, of_model
from dyndiag.landscape.saved import Floats
from dyndiag.landscape.surface import Surface, wide

_BLOCK = 1 << 20

Chosen: TypeAlias = str | Tensor | Iterable[str | Tensor] | None


@dataclass(frozen=True)
class Direction:
    """A vector in the space of the weights, and what to call it on an axis."""

    vector: Tensor = field(repr=False)
    """(P,): the trainable parameters in model order, one after another."""
    label: str

    @property
    def norm(self) -> float:
        """‖d‖₂: a coordinate c is ‖d‖·|c| away from the middle."""
        return float(torch.linalg.vector_norm(self.vector))


def random_direction(
    model: nn.Module, *, generator: Generator | None = None, parameters: Chosen = None
) -> Direction:
    """A Gaussian direction, scaled per filter to the norm of the weights' filter.

    d_i ← d_i ‖θ_i‖/‖d_i‖ for every filter i: a slice of the first dimension, which is an output
    channel of a convolution, an output unit of a linear layer, a token of an embedding. Parameters
    with fewer than two dimensions (biases, normalisation) stay where they are: d = 0. A coordinate
    of 1 then is a step as long as the weights themselves, layer by layer, so that slices of
    networks whose weights are scaled differently can be compared.

    Without a `generator`, the same direction at every call. `parameters` as for
    `curvature.hessian`. Cost: no pass; one vector of the weights' size.

    Source: Li et al. (2018), "Visualizing the loss landscape of neural nets".
    """
    generator = generator or fixed_generator()
    chosen = chosen_parameters(model, parameters)
    parts = [_filter_normalised(p.detach(), generator) for p in chosen.values()]
    return Direction(flat(parts), "random direction, filter-normalised")


def gradient_direction(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    parameters: Chosen = None,
    eval_mode: bool = True,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
) -> Direction:
    """The gradient g of the loss over all of the data, at its own length.

    A coordinate of −η is a step of gradient descent at the learning rate η. Options as for `line`.
    Cost: one gradient over the data.
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
    chosen = list(chosen_parameters(model, parameters).values())
    _, gradient = surface.slope(lambda: None, chosen)
    return Direction(flat(gradient), "gradient")


def difference(
    model: nn.Module, a: Checkpoint, b: Checkpoint, *, parameters: Chosen = None
) -> Direction:
    """θ_b − θ_a over the trainable parameters: from the model at `a`, a coordinate of 1 is b.

    Buffers have no direction: `interpolate` takes them along. Cost: no pass.
    """
    chosen = chosen_parameters(model, parameters)
    return Direction(weights_of(b, model, chosen, "b") - weights_of(a, model, chosen, "a"), "b − a")


def cosine(one: Direction, other: Direction) -> float:
    """Of the angle between the two."""
    products = gram([one.vector, other.vector])
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))


def displacement(
    model: nn.Module, directions: Sequence[Direction], parameters: Chosen
) -> Callable[[Sequence[float]], None]:
    """A function that moves the model's weights by Σ cᵢ dᵢ. At zero it touches nothing."""
    chosen = list(chosen_parameters(model, parameters).values())
    sizes = [p.numel() for p in chosen]
    vectors = [d.vector.detach() for d in directions]
    parts = [v.to(device=chosen[0].device, dtype=wide(v)).split(sizes) for v in vectors]

    def move(coordinates: Sequence[float]) -> None:
        for i, p in enumerate(chosen):
            steps = [c * d[i] for c, d in zip(coordinates, parts, strict=True) if c != 0]
            if steps:  # .data: a graph that the user holds stays valid
                p.data.copy_(p.data + sum(steps[1:], steps[0]).view(p.shape))

    return move


def _filter_normalised(weights: Tensor, generator: Generator) -> Tensor:
    if weights.dim() < 2:
        return torch.zeros_like(weights, dtype=wide(weights))
    draw = torch.randn(
        weights.shape, generator=generator, device=generator.device, dtype=wide(weights)
    )
    filters = draw.to(weights.device).flatten(1)
    norms = torch.linalg.vector_norm(weights.flatten(1), dim=1, dtype=filters.dtype)
    lengths = torch.linalg.vector_norm(filters, dim=1)
    scale = torch.where(lengths > 0, norms / lengths, 0.0)
    return (filters * scale[:, None]).view(weights.shape)


def weights_of(
    checkpoint: Checkpoint, model: nn.Module, chosen: dict[str, nn.Parameter], called: str
) -> Tensor:
    """(P,): those of the checkpoint that are trained in the model, on the model's device."""
    state = matched(checkpoint, model, called)
    names = {t.data_ptr(): name for name, t in of_model(model).items() if t.numel() > 0}
    device = next(iter(chosen.values())).device
    parts = []
    for name, p in chosen.items():
        entry = state.get(name, state.get(names.get(p.data_ptr(), "")))
        if entry is None:
            raise DyndiagError(f"{called} lacks {name!r}: it is not in the model's state dict")
        parts.append(entry.to(device=device, dtype=wide(p)))
    return flat(parts)


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1).to(wide(part)) for part in parts])


def gram(rows: Sequence[Tensor] | Tensor) -> Floats:
    """Rows times rows, in float64 by blocks: no copy of the whole."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), _BLOCK):
        block = torch.stack([row[start : start + _BLOCK].cpu().double() for row in rows])
        total += block @ block.T
    return total.numpy()
