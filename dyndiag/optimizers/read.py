"""Reading the update rule off a live optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dyndiag.errors import DyndiagError
from dyndiag.optimizers import (
    adadelta,
    adagrad,
    adam,
    adamax,
    asgd,
    nadam,
    radam,
    rmsprop,
    sgd,
)
from dyndiag.optimizers.rule import TensorRule, Unknown, UpdateRule

_Read = Callable[[Mapping[str, Any], Mapping[str, Any], float], TensorRule | None]

_READS: tuple[tuple[type[Optimizer], _Read], ...] = (
    (torch.optim.SGD, sgd.read),
    (torch.optim.Adam, adam.read),  # AdamW inherits its step
    (torch.optim.RMSprop, rmsprop.read),
    (torch.optim.Adagrad, adagrad.read),
    (torch.optim.NAdam, nadam.read),
    (torch.optim.RAdam, radam.read),
    (torch.optim.Adamax, adamax.read),
    (torch.optim.Adadelta, adadelta.read),
    (torch.optim.ASGD, asgd.read),
)


def read_rule(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    learning_rates: Sequence[float] | None = None,
) -> UpdateRule | Unknown:
    """The rule of the step that `optimizer` has just taken, over `parameters`, in their order.

    Read it after the step, when the state holds that step's gradient, and give the learning rate of
    each parameter group at that step if a scheduler may have changed it since. A parameter that is
    in no group, or that the optimizer has never moved, stands still in the rule.

    The class is known by its `step`: a subclass that keeps torch's is that optimizer, one that
    writes its own is unknown. Closures cannot be seen from here. Cost: one copy of the
    preconditioner, no product.
    """
    groups = optimizer.param_groups
    rates = [float(group["lr"]) for group in groups] if learning_rates is None else learning_rates
    if len(rates) != len(groups):
        raise DyndiagError(
            f"learning_rates must hold one number for each of the optimizer's {len(groups)} "
            f"parameter groups, but it holds {len(rates)}"
        )
    read = _read_of(optimizer)
    if read is None and hasattr(optimizer, "base_optimizer"):
        return Unknown(
            f"{type(optimizer).__name__} wraps another optimizer, whose edge it moves (SAM: ask "
            "for the probe SAMRatio)"
        )
    if read is None:
        return Unknown(
            f"the stability threshold of {type(optimizer).__name__} is not known: known are "
            f"{', '.join(kind.__name__ for kind, _ in _READS)} and AdamW, with torch's own step"
        )
    if any(group.get("maximize", False) for group in groups):
        return Unknown("the optimizer climbs (maximize=True), and stability is about descent")

    place = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    tensors = [
        read(groups[i], optimizer.state.get(p, {}), rates[i])
        if (i := place.get(id(p))) is not None
        else None
        for p in parameters
    ]
    if all(tensor is None for tensor in tensors):
        return Unknown("the optimizer has not moved any of these parameters yet")
    return UpdateRule(tuple(tensors), tuple(p.numel() for p in parameters))


def _read_of(optimizer: Optimizer) -> _Read | None:
    step = _function(optimizer.step)  # schedulers and profiling wrap it, and say so by __wrapped__
    return next((read for kind, read in _READS if _function(kind.step) is step), None)


def _function(step: Callable[..., Any]) -> object:
    inner = inspect.unwrap(step)
    return getattr(inner, "__func__", inner)
