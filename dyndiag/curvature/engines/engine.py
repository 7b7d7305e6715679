"""What an engine says of itself: which one, why, and what its check against differences found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Name = Literal["cached", "rebuilt", "forward_over_reverse", "linearised", "finite_differences"]


@dataclass(frozen=True)
class Check:
    """A product compared with differences of gradients, along one random direction."""

    outcome: Literal["agrees", "disagrees", "inconclusive", "not made"] = "not made"
    """`inconclusive`: differences at two steps disagree as much among themselves, as across the
    kinks of a ReLU or in 16 bits, so they can judge nothing."""
    difference: float = math.nan
    """‖product − difference‖ / ‖product‖, each parameter weighed by its size; for the engine
    `finite_differences`, between differences at two steps: its relative error."""
    spread: float = math.nan
    """The same between the differences at two steps."""
    gradients: int = 0
    """What it cost when it was made."""

    def __str__(self) -> str:
        if self.outcome == "not made":
            return "not checked against finite differences"
        return (
            f"{self.outcome}: {self.difference:.1e} from finite differences, which differ by "
            f"{self.spread:.1e} among themselves"
        )


@dataclass(frozen=True)
class Engine:
    """How the products of a `LossHessian` are computed."""

    name: Name
    reason: str
    """Why this one, and why not the ones before it."""
    check: Check = field(default_factory=Check)


@dataclass(frozen=True)
class Derivatives:
    """What an engine makes of a loss."""

    loss: Tensor
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
