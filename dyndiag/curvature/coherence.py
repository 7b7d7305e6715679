"""How much the curvatures of single examples agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.engines.loss import in_full_precision, loss_over
from dyndiag.curvature.memory import require
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.outputs import LossOfOutput, over_batches
from dyndiag.errors import DyndiagError

Model = TypeVar("Model", bound=nn.Module)

_MOST = 500
"""Examples: the work grows with their square."""
_BLOCK = 64
"""Examples whose products with as many others are in memory at a time."""
_ZERO = 1e-6
"""Of the largest curvature of an example in its output: below, it has none."""


@dataclass(frozen=True)
class Coherence:
    """The coherence of n matrices Hᵢ ≽ 0, and what the rule that it belongs to needs besides."""

    value: float
    """σ = λ₁(C) / maxᵢ λ₁(Hᵢ), Cᵢⱼ = √tr(HᵢHⱼ): n for n equal matrices of rank 1, 1 for
    orthogonal ones."""
    sharpness: float
    """λ₁ of their mean."""
    examples: int
    """n."""


def coherence(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    size: Callable[[Any], int] | None = None,
) -> Coherence:
    """Coherence σ of the examples' Gauss–Newton matrices Hᵢ = Jᵢᵀ (∂²ℓᵢ/∂z²) Jᵢ.

    With it `dyndiag.optimizers.certain_divergence(found.sharpness, found.value, found.examples, B)`
    is the learning rate above which SGD is certain to diverge in mean square around a minimum that
    interpolates. It proves nothing of lower rates, nor of single runs.

    `data`: at most 500 examples, a batch or a DataLoader, cut into single ones; the loss must be
    their mean, and convex in the model's output. `parameters`, `size`, modes and that no trace is
    left: as for `gauss_newton`.

    Cost: for each example a forward pass and as many backward passes as its loss has curved
    directions in the output (C for squared error of C numbers); then (nC)²/2 inner products of size
    numbers, in blocks, which for large models is the most: 3.7 s for 500 examples, 10 classes and
    3,466 parameters, 46 s for 128 and 826,378 (one CPU thread). Memory: a vector of size numbers
    for each of the nC factors, asked for before.

    After Dexter et al. (2024), "A precise characterization of SGD stability using loss surface
    geometry", arXiv 2401.12332.
    """
    loss = loss_over(model, loss_fn, data, parameters, micro_batch=1, size=size)
    n = len(loss.batches)
    if n > _MOST:
        raise DyndiagError(
            f"coherence compares every example with every other and takes at most {_MOST}, but "
            f"there are {n}: pass a part of the data"
        )
    loss = in_full_precision(loss)[0]
    found: list[Tensor] = []

    def keep(example: LossOfOutput, share: float) -> Tensor:
        # H is the weighted mean of the examples' matrices: n · share is 1 where they weigh alike.
        found.append((n * share) ** 0.5 * _factor(example, n - len(found)))
        return torch.zeros(())

    over_batches(loss)(keep)
    return coherence_of(found)


def coherence_of(factors: Sequence[Tensor]) -> Coherence:
    """Coherence of the matrices Hᵢ = FᵢᵀFᵢ. `factors`: the Fᵢ, (rank, size) each, rank 0 allowed.

    >>> import torch
    >>> x = torch.eye(3, dtype=torch.float64)[:, None]  # three orthogonal matrices of rank 1
    >>> round(coherence_of(list(x)).value, 6), round(coherence_of([x[0]] * 3).value, 6)
    (1.0, 3.0)
    """
    n = len(factors)
    ranks = [len(f) for f in factors]
    if n == 0 or max(ranks) == 0:
        raise DyndiagError("no example has any curvature, so there is nothing to compare")
    rank = max(ranks)
    padded = factors[0].new_zeros(n, rank, factors[0].shape[1])
    exact = torch.float32 if padded.device.type == "mps" else torch.float64
    for i, f in enumerate(factors):
        padded[i, : len(f)] = f
    c = torch.zeros(n, n, dtype=torch.float64)
    largest = 0.0
    for i in range(0, n, _BLOCK):
        rows = padded[i : i + _BLOCK]
        own = rows @ rows.transpose(1, 2)
        largest = max(largest, float(torch.linalg.eigvalsh(own.cpu().double())[:, -1].max()))
        for j in range(i, n, _BLOCK):
            others = padded[j : j + _BLOCK]
            inner = rows.flatten(0, 1) @ others.flatten(0, 1).T
            squares = inner.to(exact).square().view(len(rows), rank, len(others), rank)
            roots = squares.sum((1, 3)).sqrt().cpu()
            c[i : i + _BLOCK, j : j + _BLOCK] = roots
            c[j : j + _BLOCK, i : i + _BLOCK] = roots.T
    flat = padded.flatten(0, 1)
    mean = Operator(lambda v: flat.T @ (flat @ v) / n, flat.shape[1], flat.dtype, flat.device)
    pair = eigenpairs(mean)
    top = float(torch.linalg.eigvalsh(c)[-1])
    return Coherence(top / largest, float(pair.values[0]), n)


def _factor(example: LossOfOutput, left: int) -> Tensor:
    """F, (rank, size): Jᵀ(∂²ℓ/∂z²)J = FᵀF."""
    sizes = [z.numel() for z in example.outputs]
    outputs = sum(sizes)

    def parts(u: Tensor) -> list[Tensor]:
        pieces = zip(u.split(sizes), example.outputs, strict=True)
        return [part.view_as(z).to(z) for part, z in pieces]

    weights = sum(p.numel() for p in example.parameters)
    like = example.parameters[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    require(left * outputs, weights, dtype, like.device, f"the factors of {left} examples")
    if not example.curved:
        return torch.zeros(0, weights, dtype=dtype, device=like.device)
    unit = torch.eye(outputs, dtype=dtype, device=like.device)
    rows = [example.loss_hessian_product(parts(e)) for e in unit]
    curvature = torch.stack([torch.cat([r.flatten() for r in row]).to(dtype) for row in rows])
    values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
    threshold = _ZERO * float(values.abs().max())
    if float(values[0]) < -max(threshold, 10 * example.eps * float(values.abs().max())):
        raise DyndiagError(
            "the loss is not convex in the model's output, so its Gauss–Newton matrix is not "
            f"positive semidefinite (curvature {float(values[0]):.3g}), and coherence is of "
            "matrices that are"
        )
    kept = [i for i, value in enumerate(values.tolist()) if value > threshold]
    if not kept:
        return torch.zeros(0, weights, dtype=dtype, device=like.device)
    return torch.stack(
        [example.transposed_product(parts(values[i].sqrt() * vectors[:, i])) for i in kept]
    )
