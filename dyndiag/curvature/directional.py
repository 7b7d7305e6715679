"""Curvature along one direction: a number for the price of one product, or of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.curvature.hessian import LossHessian
from dyndiag.curvature.operator import Operator, require_operator
from dyndiag.errors import DyndiagError


def curvature_along(operator: Operator, direction: Tensor) -> Tensor:
    """dᵀAd / dᵀd, the Rayleigh quotient: between the extreme eigenvalues, whatever d is.

    `direction`: (size,), of any length. Returns a number of shape (), on the operator's device, in
    float64, without waiting for the device; NaN along a zero direction. Cost: one product.

    With A = `scaled(hessian, root)`, root = √(Γ/P), and d = root · gradient it is the curvature
    that a step along the preconditioned gradient meets: compare it with 2/η, as one compares
    λ₁(A), which it never exceeds (Γ and P: the optimizer's momentum factor and preconditioner).

    >>> import torch
    >>> scales = torch.tensor([4.0, 1.0])
    >>> diagonal = Operator(lambda v: scales * v, 2, torch.float32, torch.device("cpu"))
    >>> curvature_along(diagonal, torch.tensor([1.0, 1.0]))  # half of each
    tensor(2.5000, dtype=torch.float64)
    """
    d = _direction(operator, direction)
    d = d / _size(d)
    return _ratio(_inner(d, operator.product(d)), _inner(d, d))


def batch_sharpness(hessian: LossHessian) -> Tensor:
    """gᵀHg / gᵀg, the curvature along the loss's own gradient, both of the same batch.

    Its mean over mini-batches of the training's size is the batch sharpness of Andreyev &
    Beneventano (2024, arXiv 2412.20553), said to hover at 2/η in mini-batch training as λ₁ does in
    full-batch training: a mean of ratios, not the ratio of means. Loss per squared parameter, as
    λ₁(H), which it never exceeds. A number of shape (), in float64, on the device; NaN where the
    gradient is zero. Cost: one product, after the gradient that came with the Hessian.
    """
    return curvature_along(hessian, hessian.gradient)


def directional_sharpness(hessian: LossHessian, update: Tensor) -> Tensor:
    """ΔᵀHΔ / Δᵀg: the curvature that a step θ − ηΔ meets, per decrease that the gradient promises.

    To second order the step raises the loss if and only if η exceeds 2 over this number. `update`:
    (size,), Δ itself or any positive multiple c of it, which scales the answer by c; for a step
    that was taken, (θ_before − θ_after) / η. A number of shape (), in float64, on the device; NaN
    if Δᵀg ≤ 0, as momentum can make it: there is no decrease then to speak of. Cost: one product.

    Source: Pan & Li (2022), "Toward understanding why Adam converges faster than SGD for
    Transformers", arXiv 2306.00204, for ΔᵀHΔ; here it is divided by the decrease that was promised.
    """
    delta = _direction(hessian, update)
    size = _size(delta)
    delta = delta / size
    promised = _inner(delta, hessian.gradient)
    return size * _ratio(_inner(delta, hessian.product(delta)), promised)


def realised_edge(promised: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """ζ = (A + L(θ−Δ) − L(θ)) / A: how much of the promised decrease A = Δᵀg curvature took away.

    On a quadratic ζ = ½ · `directional_sharpness` of the step taken, and anywhere ζ > 1 if and only
    if the step raised the loss. `before` and `after`: the loss around the step on one batch, with
    the same random masks. NaN if A ≤ 0. Cost: the one forward pass that `after` took.

    >>> realised_edge(*torch.tensor([2.0, 5.0, 3.5]))  # three quarters of what was promised
    tensor(0.2500)
    """
    return _ratio(promised + after - before, promised)


def _direction(operator: Operator, vector: Tensor) -> Tensor:
    require_operator(operator)
    if vector.shape != (operator.size,):
        raise DyndiagError(
            f"a direction must have shape ({operator.size},), one number for each of the "
            f"operator's dimensions, but it has shape {tuple(vector.shape)}: flatten the "
            "parameters' parts in their order and concatenate them"
        )
    return vector.detach().to(device=operator.device, dtype=operator.dtype)


def _size(vector: Tensor) -> Tensor:
    """The largest entry's magnitude: divided by it, no vector under- or overflows in a square."""
    largest = torch.linalg.vector_norm(vector, ord=torch.inf)
    return torch.where(largest > 0, largest, 1.0)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb, summed in float64 where the device has it: over 10⁸ entries float32 is not enough."""
    exact = a.dtype if a.device.type == "mps" else torch.float64
    return torch.sum(a * b, dtype=exact)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.nan)
