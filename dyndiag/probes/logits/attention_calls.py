"""Finding the modules that attend, and watching them attend, without changing the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dyndiag.probes.forward import Boundary, Hook, is_compiled, undisturbed
from dyndiag.probes.logits.attention_scores import FINDERS

_TRACES = 16
"""Forwards that are followed in search of attention before the search is given up."""
_INTERCEPTION = 2e-6
"""Seconds that each call of a torch function inside an attending module takes longer while it is
watched: 1.2 µs in a loop, up to twice that amid a training step."""


Read = Callable[[nn.Module, Any, tuple[Any, ...], dict[str, Any]], None]
"""Module, function, arguments."""


class AttentionCalls:
    """Shows the attention calls of forward passes to `read`, with the module that makes them.

    A forward that is followed whole tells which modules attend (the innermost that runs when
    scores are made); in others only these are watched. Hooks are on them only in forwards that are
    followed: entering Python at each of them in all the others would cost more than the reading.
    """

    def __init__(self, model: nn.Module, read: Read, boundary: Boundary) -> None:
        self._show, self._boundary = read, boundary
        self.names = {module: name or "model" for name, module in model.named_modules()}
        self._live = False
        self.seconds = 0.0
        """Of the training's thread that this has taken, reading included."""
        compiled = any(is_compiled(module) for module in model.modules())
        self._traces_left = 0 if compiled else _TRACES
        self._found: dict[nn.Module, None] = {}  # in the order in which they ran
        self._handles: list[RemovableHandle] = []
        calls = (self._enter, self._leave)
        self._hooks = [Hook(call, "AttentionLogits", boundary) for call in calls]
        self._stack: list[nn.Module] = []
        self._mode = _Intercept(self._read)
        self._watching = False

    def follow(self, outermost: nn.Module, whole: bool) -> None:
        """A forward begins: this module's, whose own pre-hooks are running."""
        self._live = True
        if (whole and self._found) or (self._traces_left and not self._found):
            self._traces_left -= not self._found
            self._trace(outermost)
            return
        enter, leave = self._hooks
        for module in self._found:
            self._handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]
        if outermost in self._found:
            self._enter(outermost, ())

    def stop(self) -> None:
        """The forward has ended, or failed."""
        self._live = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watch(False)
        self._stack.clear()
        self.seconds += _INTERCEPTION * self._mode.calls
        self._mode.calls = 0

    def attends(self, module: nn.Module) -> None:
        """The module has made scores: watch it from here on."""
        self._found[module] = None

    def _trace(self, outermost: nn.Module) -> None:
        """Follow the forward with a stack of its modules."""
        self._stack.append(outermost)
        module_hooks = torch.nn.modules.module
        self._handles += [
            module_hooks.register_module_forward_pre_hook(self._push),
            module_hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        self._watch(True)

    def _push(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._watch(True)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
            self._watch(bool(self._stack))

    def _watch(self, on: bool) -> None:
        """Intercept torch functions from here on, or no longer; once, however modules nest."""
        if on == self._watching:
            return
        self._watching = on
        if on:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        else:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = self._stack[-1] if self._stack else None
        if not self._live or module is None or module not in self.names or not undisturbed():
            return
        began = time.perf_counter()
        with self._boundary("AttentionLogits"):
            self._show(module, func, args, kwargs)
        self.seconds += time.perf_counter() - began


class _Intercept(TorchFunctionMode):
    """Shows attention's calls to `read`, and lets every call through unchanged."""

    def __init__(self, read: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._read = read
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if func in FINDERS and not torch.compiler.is_compiling():
            self._read(func, args, kwargs)
        return func(*args, **kwargs)
