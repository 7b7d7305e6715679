"""The largest attention logit, read off the training's own forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dyndiag.batches import ForwardCall
from dyndiag.probes.attention_scores import FINDERS, Scores
from dyndiag.probes.forward import Boundary, Hook, is_compiled, undisturbed, unguarded
from dyndiag.schedule import Every
from dyndiag.state import Measurements

_TRACES = 16
"""Forwards that are followed in search of attention before the search is given up."""


class AttentionLogits:
    """`attention/logit_max_sampled/<module>` at every step, `attention/logit_max/<module>` at
    every 11th.

    z = scale · ⟨q, k⟩ + bias, after rotary embedding and query–key norms, over unmasked pairs
    and all heads, signed. The sampled series takes the first eighth of the sequences (at least
    one): exact for those, a lower bound for the batch. Found without changing the model, in
    `scaled_dot_product_attention`, in `nn.MultiheadAttention`, and in a softmax over scores of
    shape (…, queries, keys). Not seen: kernels of other packages, compiled modules, and what runs
    under selective checkpointing.

    Cost: the first forward is followed to find the modules; after that one product q kᵀ of the
    sequences taken, in tiles (a read, where the model holds the scores). No host sync.
    """

    def __init__(self, model: nn.Module, boundary: Boundary = unguarded) -> None:
        self._boundary, self._model = boundary, model
        self._names = {module: name or "model" for name, module in model.named_modules()}
        self._full_due = Every(11)
        self._full = False
        self._live = False
        self._found: dict[nn.Module, list[RemovableHandle]] = {}
        compiled = any(is_compiled(module) for module in model.modules())
        self._traces_left = 0 if compiled else _TRACES
        self._tracing: list[Any] = []
        self._stack: list[nn.Module] = []
        self._modes: list[_Intercept] = []
        self._waiting: list[tuple[nn.Module, Scores]] = []
        self._seen: dict[tuple[bool, nn.Module], Tensor] = {}

    def started(self, step: int) -> None:
        self._live = True
        self._full = self._full_due.due(step)
        if self._traces_left and not self._found:
            self._trace()

    @torch.no_grad()
    def finished(self, call: ForwardCall, output: Any) -> None:
        self._live = False
        waiting, self._waiting = self._waiting, []
        if output is not None:  # else the forward has failed
            # One after another, the products find their code and its tables in the cache: on a
            # CPU that takes a third less than in the midst of the model's own work.
            with self._boundary("AttentionLogits"):
                for module, scores in waiting:
                    self._keep(module, scores)
        for handle in self._tracing:
            handle.remove()
        self._tracing = []
        while self._modes:
            self._leave_mode()
        self._stack.clear()

    def collect(self) -> Measurements:
        seen: Measurements = {
            f"attention/{'logit_max' if full else 'logit_max_sampled'}/{self._names[module]}": z
            for (full, module), z in self._seen.items()
        }
        self._seen = {}
        return seen

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handles in self._found.values():
            for handle in handles:
                handle.remove()

    def _trace(self) -> None:
        """Follow one forward with a stack of its modules, to learn which of them attend."""
        self._traces_left -= 1
        self._stack.append(self._model)  # whose own pre-hooks have run
        module_hooks = torch.nn.modules.module
        self._tracing = [
            module_hooks.register_module_forward_pre_hook(self._push),
            module_hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        self._enter_mode()

    def _push(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()

    def _enter_mode(self) -> None:
        mode = _Intercept(self._read)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def _leave_mode(self) -> None:
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._live and not self._tracing:
            self._stack.append(module)
            self._enter_mode()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module and not self._tracing:
            self._stack.pop()
            self._leave_mode()

    def _read(self, find: Callable[[], Scores | None]) -> None:
        if not undisturbed():
            return
        with self._boundary("AttentionLogits"):
            scores = find()
            if scores is not None:
                self._measure(scores)

    def _measure(self, scores: Scores) -> None:
        module = self._stack[-1] if self._stack else None
        if not self._live or module is None or module not in self._names:
            return
        if module not in self._found:
            self._found[module] = [
                module.register_forward_pre_hook(
                    Hook(self._enter, "AttentionLogits", self._boundary)
                ),
                module.register_forward_hook(
                    Hook(self._leave, "AttentionLogits", self._boundary), always_call=True
                ),
            ]
        if scores.stay and torch.is_grad_enabled() and not _backward_recomputes():
            self._waiting.append((module, scores))
        else:
            with torch.no_grad():
                self._keep(module, scores)

    def _keep(self, module: nn.Module, scores: Scores) -> None:
        self._raise(False, module, scores.max(of=math.ceil(scores.sequences / 8)))
        if self._full:
            self._raise(True, module, scores.max(of=scores.sequences))

    def _raise(self, full: bool, module: nn.Module, highest: Tensor) -> None:
        before = self._seen.get((full, module))
        self._seen[full, module] = highest if before is None else torch.maximum(before, highest)


def _backward_recomputes() -> bool:
    """Whether checkpointing is at work, so that a forward's tensors do not wait for the backward
    pass: keeping them would cost the memory that it saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Intercept(TorchFunctionMode):
    """Shows attention's scores to `read`, and lets every call through unchanged."""

    def __init__(self, read: Callable[[Callable[[], Scores | None]], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        scores = None if torch.compiler.is_compiling() else FINDERS.get(func)
        if scores is not None:
            self._read(lambda: scores(*args, **kwargs))
        return func(*args, **kwargs)
