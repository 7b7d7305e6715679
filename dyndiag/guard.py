"""What makes measuring leave no trace on the training.

`no_trace` remembers everything that a forward or backward pass, a probe or a careless loss
function can change, and puts it back bit for bit, whether the body ends well or raises.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

Restore = Callable[[], None]

# Hooks that only watch or edit gradients: they would fire in probes' backward passes too.
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def no_trace(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Run the body as if it had never been run.

    Put back afterwards, also on error: parameters, `.grad` (the same object with the same value)
    and `requires_grad`; buffers; every plain attribute of every module (train/eval flags,
    counters, lists, metric states); the optimizer's state and parameter groups; the random
    streams of Python, NumPy and torch on every device; backend switches, grad mode, autocast.

    Inside: gradients on, inference mode and autocast off, user backward hooks silent, attention
    by its math kernel and RNNs without cuDNN (the others have no second derivative), compiled
    modules eager. The model's train/eval mode is left as it is: the body may set it.

    Cost: one copy of parameters, gradients, buffers and optimizer state each way.
    """
    restores = [*_remember_modules(model), *_remember_parameters(_all_parameters(model, optimizer))]
    if optimizer is not None:
        restores += _remember(optimizer.state) + _remember(optimizer.param_groups)
    restores += _remember_random_streams()
    restores += _remember_switches()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:  # importing it would take seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_backward_hooks_silent(model))
            yield
    finally:
        with torch.no_grad():
            for restore in restores:
                restore()


def _all_parameters(model: nn.Module, optimizer: Optimizer | None) -> Iterable[Tensor]:
    known: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    if optimizer is not None:
        known |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return known.values()


def _remember_parameters(parameters: Iterable[Tensor]) -> list[Restore]:
    return [_remember_parameter(p) for p in parameters]


def _remember_parameter(p: Tensor) -> Restore:
    requires_grad, grad = p.requires_grad, p.grad
    put_value = _remember_tensor(p)
    put_grad = None if grad is None else _remember_tensor(grad)

    def restore() -> None:
        put_value()
        if p.requires_grad != requires_grad:
            p.requires_grad_(requires_grad)
        if p.grad is not grad:
            p.grad = grad
        if put_grad is not None:
            put_grad()

    return restore


def _remember_tensor(tensor: Tensor) -> Restore:
    if tensor.layout is not torch.strided or _overlaps_itself(tensor):
        return lambda: None  # sparse gradients and expanded views: nobody can write into them
    # .data keeps the version counter where it is, so a graph that the user holds stays valid.
    value = tensor.data.clone()

    def restore() -> None:
        tensor.data.copy_(value)

    return restore


def _overlaps_itself(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _remember_modules(model: nn.Module) -> list[Restore]:
    restores: list[Restore] = []
    for module in model.modules():
        attributes = vars(module)
        before = dict(attributes)
        restores.append(lambda a=attributes, b=before: _put_back_dict(a, b))  # type: ignore[misc]
        for name, value in before.items():
            if "hooks" not in name:
                restores += _remember(value)
    return restores


def _remember(value: Any) -> list[Restore]:
    """Restores for a tensor or a (nested) list, dict or set; anything else is kept by reference."""
    if isinstance(value, nn.Parameter):
        return []  # remembered once, with its gradient
    if isinstance(value, Tensor):
        return [_remember_tensor(value)]
    if isinstance(value, dict):
        before = dict(value)
        inner = [restore for item in before.values() for restore in _remember(item)]
        return [lambda: _put_back_dict(value, before), *inner]
    if isinstance(value, list):
        items = list(value)
        inner = [restore for item in items for restore in _remember(item)]
        return [lambda: _put_back_list(value, items), *inner]
    if isinstance(value, set):
        members = set(value)
        return [lambda: _put_back_set(value, members)]
    if isinstance(value, tuple):
        return [restore for item in value for restore in _remember(item)]
    return []


def _put_back_dict(target: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(target) == len(before) and all(
        key in target and target[key] is value for key, value in before.items()
    ):
        return
    target.clear()
    target.update(before)


def _put_back_list(target: list[Any], before: list[Any]) -> None:
    if len(target) != len(before) or any(a is not b for a, b in zip(target, before, strict=True)):
        target[:] = before


def _put_back_set(target: set[Any], before: set[Any]) -> None:
    if target != before:
        target.clear()
        target.update(before)


def _remember_random_streams() -> list[Restore]:
    python, cpu = random.getstate(), torch.get_rng_state()
    restores: list[Restore] = [
        lambda: random.setstate(python),
        lambda: torch.set_rng_state(cpu),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        restores.append(lambda: numpy.random.set_state(state))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        restores.append(lambda: torch.cuda.set_rng_state_all(states))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        restores.append(lambda: torch.mps.set_rng_state(mps))
    return restores


def _remember_switches() -> list[Restore]:
    """Switches that a loss function may set; the body's own are undone by their contexts."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    kernels = (
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
    )

    def restore() -> None:
        for name, value in flags.items():
            if getattr(cudnn, name) != value:
                setattr(cudnn, name, value)
        for switch, value in kernels:
            switch(value)

    return [restore]


@contextmanager
def _backward_hooks_silent(model: nn.Module) -> Iterator[None]:
    hooks = [
        table
        for owner in (*model.modules(), *model.parameters())
        for name in _BACKWARD_HOOKS
        if (table := getattr(owner, name, None))
    ]
    before = [dict(table) for table in hooks]
    try:
        for table in hooks:
            table.clear()
        yield
    finally:
        for table, entries in zip(hooks, before, strict=True):
            table.clear()
            table.update(entries)
