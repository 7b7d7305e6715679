"""The one thing a solver knows: a product with a symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """A symmetric linear map on flat vectors: all that a solver may know."""

    product: Callable[[Tensor], Tensor]
    """(size,) → (size,), in `dtype`, on `device`."""
    size: int
    dtype: torch.dtype
    device: torch.device
    parts: Mapping[str, slice] = field(default_factory=dict, kw_only=True)
    """Parameter name → where it stands in a vector; empty where there are no parameters."""


def scaled(operator: Operator, root: Tensor, shift: Tensor | None = None) -> Operator:
    """R A R + diag(shift), with R = diag(root). Both have shape (size,); one product of A each.

    Scaling from both sides keeps the operator symmetric, which P⁻¹A is not.
    """

    def product(v: Tensor) -> Tensor:
        image = root * operator.product(root * v)
        return image if shift is None else image + shift * v

    return Operator(product, operator.size, operator.dtype, operator.device)


def negated(operator: Operator) -> Operator:
    """−A, at the cost of A."""
    return Operator(lambda v: -operator.product(v), operator.size, operator.dtype, operator.device)
