"""Remembering what there is, and putting it back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyndiag.guard.held import MISSING, content
from dyndiag.guard.kinds import FIXED, MANY, Generator

Restore = Callable[[], None]


def reachable(roots: Iterable[object]) -> list[object]:
    """What a pass may change: modules, tensors, arrays and generators, in nested containers."""
    found: dict[int, object] = {}
    todo = list(roots)
    while todo:
        value = todo.pop()
        if type(value) in FIXED or id(value) in found:
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
        elif isinstance(value, Tensor | set | np.ndarray | Generator):
            found[id(value)] = value
    return list(found.values())


def remember(value: Any) -> Restore:
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


def remember_name(where: Any, name: Any) -> list[Restore]:
    """How to bind a variable to what it is bound to now, and what that holds if it collects."""
    before = content(where, name)

    def restore() -> None:
        if content(where, name) is before:
            return
        if isinstance(where, dict):
            if before is MISSING:
                del where[name]
            else:
                where[name] = before
        elif before is MISSING:
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
        if len(value) <= MANY:
            found.append(remember(value))
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, list):  # which grows, if anything
            found.append(functools.partial(_cut_off, value, len(value)))
    return found


def _cut_off(target: list[Any], length: int) -> None:
    del target[length:]


def remember_random_streams() -> list[Restore]:
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


def remember_switches() -> list[Restore]:
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
