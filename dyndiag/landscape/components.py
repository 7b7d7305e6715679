"""The plane in which the checkpoints of a training vary most, and where they lie in a plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dyndiag.curvature.data import chosen_parameters
from dyndiag.errors import DyndiagError
from dyndiag.landscape.checkpoints import Checkpoint
from dyndiag.landscape.directions import Chosen, Direction, flat, gram, weights_of
from dyndiag.landscape.progress import bar
from dyndiag.landscape.saved import Floats


@dataclass(frozen=True)
class PrincipalComponents:
    """The two directions in which checkpoints of a training vary most."""

    directions: tuple[Direction, Direction]
    """Orthogonal, of unit length, the first with the greater variance."""
    coordinates: Floats
    """(k, 2): each checkpoint's weights, less the model's, projected onto the two."""
    explained_variance: Floats
    """(2,): the share of the checkpoints' variance around their mean that lies along each."""


def principal_components(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    *,
    parameters: Chosen = None,
    progress: bool = True,
) -> PrincipalComponents:
    """The plane in which the checkpoints of a training vary most, and where they lie in it.

    The first two principal components of the flattened weights, of which the mean is taken off;
    the coordinates count from the model's present weights, such as the last checkpoint. The plane
    goes through the model, not through the mean, and every checkpoint but the model's own lies
    beside it: the loss of the plane at a projected point is not the checkpoint's loss.

    Misleads: high-dimensional random walks and smooth drifts alike have most of their variance in
    two components and look like an arc (Antognini & Sohl-Dickstein 2018, "PCA of high dimensional
    random walks with comparison to neural network training").

    Cost: no pass; memory for all checkpoints' weights in float32, k²·P multiplications.
    """
    if len(checkpoints) < 3:
        raise DyndiagError(
            f"two principal components take at least 3 checkpoints, but {len(checkpoints)} came"
        )
    chosen = chosen_parameters(model, parameters)
    rows = torch.stack(list(_steps(checkpoints, model, chosen, progress)))
    centred = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(np.nan_to_num(gram(centred), nan=0.0, posinf=0.0, neginf=0.0))
    values, vectors = values[::-1].clip(0.0), vectors[:, ::-1]
    if not centred.isfinite().all() or values[1] <= 1e-12 * values[0]:
        raise DyndiagError(
            "the checkpoints lie on one line (or are the same, or hold NaN or inf), so there is no "
            "plane: pass three that differ, or draw their line by difference()"
        )
    found = []
    for i in range(2):
        mix = torch.as_tensor(vectors[:, i].copy()).to(centred)
        vector = mix @ centred
        vector /= torch.linalg.vector_norm(vector)
        share = values[i] / values.sum()
        found.append(Direction(vector, f"principal component {i + 1} ({share:.0%} of variance)"))
    one, two = found
    coordinates = torch.stack([rows @ d.vector for d in found], dim=1).double().cpu().numpy()
    return PrincipalComponents((one, two), coordinates, values[:2] / values.sum())


def project(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    directions: Sequence[Direction],
    parameters: Chosen,
    progress: bool,
) -> Floats:
    """(k, 2): the point of the plane that is nearest to each checkpoint. Not only orthogonal."""
    chosen = chosen_parameters(model, parameters)
    device = next(iter(chosen.values())).device
    basis = torch.stack([d.vector.to(device) for d in directions])
    inverse = np.linalg.inv(gram(basis))
    steps = _steps(checkpoints, model, chosen, progress)
    products = torch.stack([basis @ step.to(basis.dtype) for step in steps])
    return products.cpu().double().numpy() @ inverse


def _steps(
    checkpoints: Sequence[Checkpoint],
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    progress: bool,
) -> Iterator[Tensor]:
    """(P,) for each checkpoint: its weights less the model's. One is read at a time."""
    here = flat([p.detach() for p in chosen.values()])
    with bar(len(checkpoints), "checkpoints", progress, unit="checkpoint") as tick:
        for i, checkpoint in enumerate(checkpoints):
            yield weights_of(checkpoint, model, chosen, f"checkpoint {i}") - here
            tick(1)
