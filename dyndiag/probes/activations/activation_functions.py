"""Activation functions, wherever they are called: as modules, as functions, as methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ONE_SIDED = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "elu", "selu", "celu", "gelu",
    "silu", "mish", "hardswish",
)  # fmt: skip
TWO_SIDED = ("tanh", "hardtanh", "softsign", "tanhshrink", "hardshrink", "softshrink")
PARTS = ("sigmoid", "erf", "softplus")
"""What activations are made of where a module spells them out; elsewhere no units."""
_FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(place, form): name
    for name in (*_ONE_SIDED, *TWO_SIDED, *PARTS)
    for form in (name, f"{name}_")
    for place in (F, torch, Tensor)
    if hasattr(place, form)
}


class Intercept(TorchFunctionMode):
    """Shows what activation functions give to `read`, and changes nothing."""

    def __init__(self, read: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        function = _FUNCTIONS.get(func)
        if function is not None:
            self._read(function, output)
        return output


def has_parts(module: nn.Module) -> bool:
    """Whether it has children. (They are not asked for their truth: an empty Sequential is false,
    and a compiled module raises.)"""
    return next(module.children(), None) is not None


def only_applies(module: nn.Module) -> bool:
    """Whether it has no parts and no weights, but for a slope of each channel."""
    return not has_parts(module) and all(p.dim() < 2 for p in module.parameters())
