"""What a user hands in, checked before anything is touched."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dyndiag.batches import Batch, LossFunction, check_probe_batch
from dyndiag.errors import DyndiagError
from dyndiag.probes import Probe, StepProbe
from dyndiag.values import Estimate


def check_arguments(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction | None,
    run: object,
    probe_batch: Batch,
    budget: float,
) -> None:
    """Raises DyndiagError: what was expected, what came, what to do."""
    if not isinstance(model, nn.Module):
        raise DyndiagError(
            f"model must be a torch.nn.Module, but it is a {type(model).__name__}: "
            "pass the module whose parameters are trained"
        )
    if not isinstance(optimizer, Optimizer):
        raise DyndiagError(
            f"optimizer must be a torch.optim.Optimizer, but it is "
            f"{'missing' if optimizer is None else 'a ' + type(optimizer).__name__}: "
            "pass the object whose .step() updates the model (a wrapper's .optimizer)"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise DyndiagError(
            f"loss_fn must be a function loss_fn(model, batch) -> scalar, but it is a "
            f"{type(loss_fn).__name__}"
        )
    if loss_fn is not None and (takes := _other_arguments(loss_fn)) is not None:
        raise DyndiagError(
            f"loss_fn must take the model and one batch, loss_fn(model, batch), but it takes "
            f"{takes}"
        )
    if not isinstance(run, str | os.PathLike):
        raise DyndiagError(
            f"run must be the path of the run's folder, but it is {run!r}: pass run='runs/name'"
        )
    parameters = {id(p) for p in model.parameters()}
    if not parameters:
        raise DyndiagError(
            f"the model ({type(model).__name__}) has no parameters: there is nothing to watch; "
            "pass the module that is trained"
        )
    if not any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
        raise DyndiagError(
            "the optimizer updates none of the model's parameters: make it from "
            "model.parameters() of the very model that is passed (after any move or copy of it)"
        )
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise DyndiagError(
            f"the model ({type(model).__name__}) has lazy parameters without a shape yet: "
            "run one batch through it before the monitor is made"
        )
    if isinstance(probe_batch, DataLoader):
        raise DyndiagError(
            "probe_batch must be one batch, but it is a DataLoader: pass next(iter(loader))"
        )
    if probe_batch is not None:
        check_probe_batch(probe_batch)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise DyndiagError(
            f"budget is the time for measuring as a share of training time, above 0 (default "
            f"0.05), but it is {budget!r}"
        )


def _other_arguments(function: LossFunction) -> str | None:
    """The function's arguments, if it cannot be called with two."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins do not tell
        return None
    try:
        signature.bind(None, None)
    except TypeError:
        return str(signature)
    return None


def check_probes(probes: Sequence[object], default: Sequence[Probe]) -> None:
    """Raises DyndiagError for what is no probe, and for two with one name."""
    if isinstance(probes, Probe | StepProbe) or not isinstance(probes, Sequence):
        raise DyndiagError(
            f"probes must be a list of probes, but it is a {type(probes).__name__}: pass [probe]"
        )
    names = {probe.name for probe in default}
    for probe in probes:
        if isinstance(probe, type) or not isinstance(probe, Probe | StepProbe):
            made = f"{probe.__name__}()" if isinstance(probe, type) else "a probe"
            raise DyndiagError(
                f"probes must hold probes, with a name, a schedule `due` and `measure` or "
                f"`before` and `after`, but it holds {probe!r}: pass {made}"
            )
        if probe.name in names:
            raise DyndiagError(
                f"there are two probes named {probe.name}: each measures the same series, so "
                "pass one (the default set has "
                f"{', '.join(known.name for known in default)})"
            )
        names.add(probe.name)


def check_values(values: object) -> None:
    """Raises DyndiagError for what cannot be kept as series of a step."""
    if not isinstance(values, Mapping):
        raise DyndiagError(
            f"expected series names with their values, {{'policy/entropy': 1.2}}, but got a "
            f"{type(values).__name__}"
        )
    for name, value in values.items():
        parts = name.split("/") if isinstance(name, str) else []
        if len(parts) < 2 or not all(part and part.isprintable() for part in parts):
            raise DyndiagError(
                f"a series is named area/quantity[/part], as in 'policy/entropy', but got {name!r}"
            )
        if isinstance(value, bool) or not isinstance(
            value, int | float | Tensor | Estimate | np.ndarray | np.generic
        ):
            raise DyndiagError(
                f"the value of {name} must be a number, a tensor or an Estimate, but it is a "
                f"{type(value).__name__}"
            )


def trainable(model: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Parameter, ...]]:
    """Names and parameters that require a gradient, in model order, tied ones once."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return tuple(name for name, _ in found), tuple(p for _, p in found)
