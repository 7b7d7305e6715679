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
    scores are made); in others only these are watched. One hook stays on each, which finds out
    whether the forward is followed also where the module is called before or without the model.
    """

    def __init__(self, model: nn.Module, read: Read, boundary: Boundary) -> None:
        self._model, self._show, self._boundary = model, read, boundary
        self.names = {module: name or "model" for name, module in model.named_modules()}
        self.live = False
        """Whether a forward is being followed."""
        self.seconds = 0.0
        """Of the training's thread that this has taken, reading included."""
        compiled = any(is_compiled(module) for module in model.modules())
        self._traces_left = 0 if compiled else _TRACES
        self._found: dict[nn.Module, RemovableHandle] = {}
        self._leaving: dict[nn.Module, RemovableHandle] = {}
        self._tracing: list[Any] = []
        self._stack: list[nn.Module] = []
        self._mode = _Intercept(self._read)
        self._watching = False

    def follow(self, whole: bool) -> None:
        """A forward begins."""
        self.live = True
        if (whole and self._found) or (self._traces_left and not self._found):
            self._traces_left -= not self._found
            self._trace()

    def stop(self) -> None:
        """The forward has ended, or failed."""
        self.live = False
        for handle in (*self._tracing, *self._leaving.values()):
            handle.remove()
        self._tracing, self._leaving = [], {}
        self._watch(False)
        self._stack.clear()
        self.seconds += _INTERCEPTION * self._mode.calls
        self._mode.calls = 0

    def attends(self, module: nn.Module) -> None:
        """The module has made scores: watch it from here on."""
        if module not in self._found:
            hook = _Hook(self, self._enter, self._boundary)
            self._found[module] = module.register_forward_pre_hook(hook)

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.stop()
        for handle in self._found.values():
            handle.remove()

    def _trace(self) -> None:
        """Follow the forward with a stack of its modules."""
        self._stack.append(self._model)  # whose own pre-hooks have run
        module_hooks = torch.nn.modules.module
        self._tracing = [
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
        if self._tracing:
            return
        if module not in self._leaving:
            hook = _Hook(self, self._leave, self._boundary)
            self._leaving[module] = module.register_forward_hook(hook, always_call=True)
        self._stack.append(module)
        self._watch(True)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module and not self._tracing:
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
        if not self.live or module is None or module not in self.names or not undisturbed():
            return
        began = time.perf_counter()
        with self._boundary("AttentionLogits"):
            self._show(module, func, args, kwargs)
        self.seconds += time.perf_counter() - began


class _Hook(Hook):
    """A hook that does as good as nothing in forwards that are not followed."""

    def __init__(
        self, calls: AttentionCalls, call: Callable[..., None], boundary: Boundary
    ) -> None:
        super().__init__(call, "AttentionLogits", boundary)
        self._calls = calls

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling() and self._calls.live:
            super().__call__(*args)


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
