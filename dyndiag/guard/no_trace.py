"""The guard itself.

`no_trace` remembers everything that a forward or backward pass, a probe or a careless loss
function can change, and puts it back bit for bit, whether the body ends well or raises.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from dyndiag.guard.held import forward_hooks, held
from dyndiag.guard.remember import (
    Restore,
    reachable,
    remember,
    remember_name,
    remember_random_streams,
    remember_switches,
)

# Hooks that only watch or edit gradients: they would fire in probes' backward passes too.
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def no_trace(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    loss_fn: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Run the body as if it had never been run.

    Put back afterwards, also on error or Ctrl-C: parameters, `.grad` (the same object with the
    same value) and `requires_grad`; buffers; every plain attribute of every module (train/eval
    flags, counters, lists, arrays, generators); the optimizer's state and parameter groups; the
    random streams of Python, NumPy and torch on every device; backend switches, grad mode,
    autocast. Modules and generators that `loss_fn` works with besides its arguments (a generator
    network, a teacher) count as the model's. Amid a training, that is with its optimizer, so does
    what it and the model's forward hooks count or collect in: variables around them, attributes of
    the object they belong to, lists, dicts and sets in these. Other objects are left as the body
    leaves them.

    Inside: gradients on, inference mode and autocast off, user backward hooks silent, attention
    by its math kernel and RNNs without cuDNN (the others have no second derivative), compiled
    modules eager. The model's train/eval mode is left as it is: the body may set it.

    Cost: one copy of parameters, gradients, buffers and optimizer state each way.
    """
    values, names = held(loss_fn)
    roots: list[object] = [model, *values]
    if optimizer is None:
        names = []
    else:
        for hook in forward_hooks(reachable(roots)):
            values, more = held(hook)
            roots += values
            names += more
        roots += [optimizer.state, optimizer.param_groups]
    reached = reachable(roots)
    restores = remember_switches() + remember_random_streams()
    restores += [remember(value) for value in reached]
    restores += [restore for name in names for restore in remember_name(*name)]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(value, nn.RNNBase) for value in reached):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:  # importing it would take seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_backward_hooks_silent(reached))
            yield
    finally:
        with _interrupts_wait(), torch.no_grad():
            _put_back(restores)


def _put_back(restores: list[Restore]) -> None:
    try:
        while restores:
            restores.pop()()
    finally:
        if restores:  # one of them has raised: the others all the same
            _put_back(restores)


@contextmanager
def _backward_hooks_silent(owners: Iterable[object]) -> Iterator[None]:
    hooks = [
        table
        for owner in owners
        if isinstance(owner, nn.Module | Tensor)
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


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect when the body is done: what was put back by half would be a trace."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # only the main thread is ever interrupted
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for args in came[:1]:
            handler(*args)
