"""How steeply the class scores change with the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch, ForwardCall, LossFunction
from dyndiag.errors import DyndiagError
from dyndiag.probes.forward import logits_of
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate


class InputJacobian:
    """`predictions/input_jacobian_norm`: √ of the mean over examples of ‖J‖_F², J = ∂logits/∂input.

    On the probe batch, eval mode. With C logits an example (for sequences all positions' together)
    and v uniform on their unit sphere, ‖J‖_F² = C·E‖vᵀJ‖² (Hoffman, Roberts & Yaida 2019,
    arXiv 1908.02729): one v an example, and one backward pass for all examples, since no example's
    logits depend on another's input. `.error` is the standard error over examples and draws; NaN
    for one example.

    The input is the first floating-point tensor that the model is called with. Without one (a
    language model's tokens are integers) nothing is measured, which is told once.

    Range: ≥ 0, in logits per unit of the input; its square is unbiased. Cost: a forward and a
    backward pass without the weights' own gradients, 0.6 to 1.0 gradients as measured. By default
    at most 1 % of training time.

    Misleads: it changes with the input's scaling and grows as the logits do, so a falling loss
    alone raises it; it is local, and says nothing beyond the next kink of a ReLU network.
    """

    name = "InputJacobian"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=1)
        self.notices: list[str] = []
        self._generator = torch.Generator().manual_seed(4)

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        try:
            found = [self._squares(state, batch) for batch in state.probe.batches]
        except DyndiagError as reason:
            self.notices.append(str(reason))
            return {}
        squares = torch.cat(found).double().cpu()
        mean = float(squares.mean())
        error = math.nan
        if len(squares) > 1 and mean > 0:
            error = float(squares.std()) / math.sqrt(len(squares)) / (2 * math.sqrt(mean))
        value = math.sqrt(mean) if mean >= 0 else mean
        return {"predictions/input_jacobian_norm": Estimate(value, error=error)}

    def _squares(self, state: TrainState, batch: Batch) -> Tensor:
        """C·‖vᵀJ‖² of each example, (examples,)."""
        with torch.enable_grad():
            x, logits = _input_and_logits(state.model, state.loss_fn, batch)
            rows = logits.flatten(1)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            v = torch.randn(rows.shape, generator=self._generator).to(rows)
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            (slope,) = torch.autograd.grad((v * rows).sum(), x, allow_unused=True)
        if slope is None:
            raise DyndiagError(_NO_DERIVATIVE)
        wide = slope.reshape(len(slope), -1).to(torch.promote_types(slope.dtype, torch.float32))
        return rows.shape[1] * torch.linalg.vector_norm(wide, dim=1).square()


_NO_DERIVATIVE = (
    "no input Jacobian: the class scores have no derivative by the model's floating-point input"
)


def _input_and_logits(
    model: nn.Module, loss_fn: LossFunction | None, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The model's float input, and its class scores with their graph from it."""
    with _calls(model) as calls:
        if loss_fn is not None:
            loss_fn(model, batch)
        elif isinstance(batch, ForwardCall):
            model(*batch.args, **batch.kwargs)
        elif isinstance(batch, Mapping):
            model(**batch)
        else:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    for x, logits in reversed(calls):
        if x is None or logits is None:
            continue
        if len(x) != len(logits):
            raise DyndiagError(
                f"no input Jacobian: an input of shape {tuple(x.shape)} gives class scores of "
                f"shape {tuple(logits.shape)}, so that they are not one example's a row"
            )
        if not logits.requires_grad:
            raise DyndiagError(_NO_DERIVATIVE)
        return x, logits
    raise DyndiagError(
        "no input Jacobian: the model is not called with a floating-point tensor (tokens have no "
        "derivative), or its output holds no class scores"
    )


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[Tensor | None, Tensor | None]]]:
    """The first float input, with a graph from it on, and the logits of each call of the model."""
    inputs: list[Tensor | None] = []
    calls: list[tuple[Tensor | None, Tensor | None]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs.append(None)
        positional, named = list(args), dict(kwargs)
        slots: list[tuple[Any, Any]] = [(positional, i) for i in range(len(positional))]
        slots += [(named, key) for key in named if "mask" not in key]
        for held, key in slots:
            if _is_input(held[key]):
                x = held[key]
                held[key] = inputs[-1] = x if x.requires_grad else x.detach().requires_grad_()
                break
        return tuple(positional), named

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((inputs.pop(), logits_of(output)))

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_input(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
