"""Random vectors. Randomness comes in by the front door: nothing here moves a global stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyndiag.curvature.operator import Operator

_SEED = 20260117


def fixed_generator() -> torch.Generator:
    """A fresh generator that always starts at the same point: the same answer at every call.

    It lives on the CPU whatever the operator's device, so that answers do not depend on it.
    """
    return torch.Generator().manual_seed(_SEED)


def gaussian(operator: Operator, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries, shape (size,), drawn where the generator lives."""
    draw = torch.randn(
        operator.size, generator=generator, device=generator.device, dtype=operator.dtype
    )
    return draw.to(operator.device)


def rademacher(operator: Operator, generator: torch.Generator) -> Tensor:
    """Independent ±1 entries, shape (size,), drawn where the generator lives."""
    bits = torch.randint(
        2, (operator.size,), generator=generator, device=generator.device, dtype=operator.dtype
    )
    return (2 * bits - 1).to(operator.device)


def random_start(operator: Operator, generator: torch.Generator) -> Tensor:
    """A Gaussian vector of unit expected norm, shape (size,)."""
    return gaussian(operator, generator) / math.sqrt(operator.size)
