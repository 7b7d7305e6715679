"""What a user hands in, checked before anything is touched."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dyndiag.batches import Batch, LossFunction, check_probe_batch
from dyndiag.errors import DyndiagError


def check_arguments(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction | None,
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
    if not budget > 0:
        raise DyndiagError(
            f"budget is the time for measuring as a share of training time, above 0 (default "
            f"0.05), but it is {budget}"
        )


def trainable(model: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Parameter, ...]]:
    """Names and parameters that require a gradient, in model order, tied ones once."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return tuple(name for name, _ in found), tuple(p for _, p in found)
