"""What makes measuring leave no trace on the training.

`no_trace` remembers everything that a forward or backward pass, a probe or a careless loss
function can change, and puts it back bit for bit, whether the body ends well or raises.
"""

from __future__ import annotations

import functools
import inspect
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

Restore = Callable[[], None]

# Hooks that only watch or edit gradients: they would fire in probes' backward passes too.
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


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
    held, names = _held(loss_fn)
    roots: list[object] = [model, *held]
    if optimizer is None:
        names = []
    else:
        for hook in _forward_hooks(_reachable(roots)):
            held, more = _held(hook)
            roots += held
            names += more
        roots += [optimizer.state, optimizer.param_groups]
    reached = _reachable(roots)
    restores = _remember_switches() + _remember_random_streams()
    restores += [_remember(value) for value in reached]
    restores += [restore for name in names for restore in _remember_name(*name)]
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


_Name = tuple[Any, Any]
"""A dict of variables and a name in it; or a closure's cell and None."""


def _held(function: object) -> tuple[list[object], list[_Name]]:
    """Modules and random generators that a function works with besides its arguments, and the
    variables that it can count or collect in.

    Those in its closure, its defaults, the globals it names and the object it belongs to; also by
    way of functions of the same file.
    """
    found: list[object] = []
    names: list[_Name] = []
    seen: set[int] = set()
    home: dict[str, Any] | None = None
    todo = [function]
    while todo:
        value = todo.pop()
        if type(value) in _FIXED or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | _Generator):
            found.append(value)
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            todo += [value.__func__, *getattr(value.__self__, "__dict__", {}).values()]
            todo.append(value.__self__ if isinstance(value.__self__, nn.Module) else None)
            names += _attributes(value)
        elif isinstance(value, FunctionType):
            home = value.__globals__ if home is None else home
            if value.__globals__ is home:
                around = _surroundings(value)
                names += around
                todo += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
                todo += [_content(*name) for name in around]
        elif isinstance(value, list | tuple | dict):
            if len(value) <= _MANY:
                todo += value.values() if isinstance(value, dict) else value
        elif value is function:  # an object with __call__
            todo.append(getattr(value, "__call__", None))  # noqa: B004
    return found, names


def _surroundings(function: FunctionType) -> list[_Name]:
    """Variables that a function refers to: of its closure, and globals."""
    found: list[_Name] = [(cell, None) for cell in function.__closure__ or ()]
    found += [(function.__globals__, name) for name in _names(function)]
    return found


def _names(function: FunctionType) -> Iterator[str]:
    """Globals and attributes that a function and those inside it name."""
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        yield from code.co_names


def _attributes(method: MethodType) -> list[_Name]:
    """Attributes of its object that a method and the methods it calls name."""
    own = getattr(method.__self__, "__dict__", None)
    if own is None or isinstance(method.__self__, nn.Module):
        return []
    functions, found = [method.__func__], dict[str, _Name]()
    for function in functions:
        for name in _names(function) if isinstance(function, FunctionType) else ():
            if name not in found:
                found[name] = (own, name)
                functions.append(inspect.getattr_static(type(method.__self__), name, None))
    return list(found.values())


_MISSING = object()


def _content(where: Any, name: Any) -> Any:
    """Of a variable; `_MISSING` while it has none."""
    if isinstance(where, dict):
        return where.get(name, _MISSING)
    try:
        return where.cell_contents
    except ValueError:
        return _MISSING


def _remember_name(where: Any, name: Any) -> list[Restore]:
    """How to bind a variable to what it is bound to now, and what that holds if it collects."""
    before = _content(where, name)

    def restore() -> None:
        if _content(where, name) is before:
            return
        if isinstance(where, dict):
            if before is _MISSING:
                del where[name]
            else:
                where[name] = before
        elif before is _MISSING:
            del where.cell_contents
        else:
            where.cell_contents = before

    return [restore, *_remember_collected(before)]


def _remember_collected(value: object) -> list[Restore]:
    """How to give lists, dicts and sets, also in each other, their present members again."""
    found: list[Restore] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if not isinstance(value, list | tuple | dict | set | deque) or id(value) in seen:
            continue
        seen.add(id(value))
        if len(value) <= _MANY:
            found.append(_remember(value))
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, list):  # which grows, if anything
            found.append(functools.partial(_cut_off, value, len(value)))
    return found


def _cut_off(target: list[Any], length: int) -> None:
    del target[length:]


def _forward_hooks(reached: Iterable[object]) -> Iterator[object]:
    """Those of the modules, but for dyndiag's own."""
    for module in reached:
        if isinstance(module, nn.Module):
            for table in (module._forward_hooks, module._forward_pre_hooks):
                yield from (h for h in table.values() if not _is_own(h))


def _is_own(hook: object) -> bool:
    return type(hook).__module__.partition(".")[0] == __package__


_MANY = 1000
"""Containers longer than this hold data, not modules."""
# What cannot change; said first because there is so much of it.
_FIXED = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, type}


def _reachable(roots: Iterable[object]) -> list[object]:
    """What a pass may change: modules, tensors, arrays and generators, in nested containers."""
    found: dict[int, object] = {}
    todo = list(roots)
    while todo:
        value = todo.pop()
        if type(value) in _FIXED or id(value) in found:
            continue
        if isinstance(value, nn.Module):
            found[id(value)] = value
            todo.append(vars(value))
        elif isinstance(value, dict):
            found[id(value)] = value
            todo += value.values()
        elif isinstance(value, list | tuple | deque):
            found[id(value)] = value
            todo += value
        elif isinstance(value, Tensor | set | np.ndarray | _Generator):
            found[id(value)] = value
    return list(found.values())


def _remember(value: Any) -> Restore:
    """How to give a value its present content again."""
    if isinstance(value, Tensor):
        return _remember_leaf(value) if value.is_leaf else _remember_tensor(value)
    if isinstance(value, dict):
        return functools.partial(_put_back_dict, value, dict(value))
    if isinstance(value, list | deque):
        return functools.partial(_put_back_list, value, list(value))
    if isinstance(value, set):
        return functools.partial(_put_back_set, value, set(value))
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return functools.partial(np.copyto, value, value.copy())
    if isinstance(value, torch.Generator):
        return functools.partial(_set_state, value, value.get_state())
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    return _nothing


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _nothing() -> None:
    pass


def _remember_leaf(p: Tensor) -> Restore:
    requires_grad, grad = p.requires_grad, p.grad
    put_value = _remember_tensor(p)
    put_grad = _nothing if grad is None else _remember_tensor(grad)

    def restore() -> None:
        put_value()
        if p.requires_grad != requires_grad:
            p.requires_grad_(requires_grad)
        if p.grad is not grad:
            p.grad = grad
        put_grad()

    return restore


def _remember_tensor(tensor: Tensor) -> Restore:
    if tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor):
        return _nothing
    if _overlaps_itself(tensor):  # an expanded view: nobody can write into it
        return _nothing
    # .data keeps the version counter where it is, so a graph that the user holds stays valid.
    value = tensor.data.clone()

    def restore() -> None:
        tensor.data.copy_(value)

    return restore


def _overlaps_itself(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _put_back_dict(target: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(target) == len(before) and all(a is b for a, b in zip(target, before, strict=True)):
        for key, value in before.items():
            if target[key] is not value:
                target[key] = value
    else:
        target.clear()
        target.update(before)


def _put_back_list(target: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(target) != len(before) or any(a is not b for a, b in zip(target, before, strict=True)):
        target.clear()
        target.extend(before)


def _put_back_set(target: set[Any], before: set[Any]) -> None:
    if target != before:
        target.clear()
        target.update(before)


def _remember_random_streams() -> list[Restore]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restores: list[Restore] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),
        lambda: torch.set_rng_state(cpu),
    ]
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
