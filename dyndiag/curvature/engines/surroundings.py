"""What surrounds the user's code while it is differentiated, on top of the guard."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast that the user's code opens in this thread has no effect."""
    enter: Callable[[torch.autocast], Any] = torch.autocast.__enter__
    thread = threading.get_ident()

    def enter_disabled(self: torch.autocast) -> Any:
        if threading.get_ident() != thread:
            return enter(self)
        enabled, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = enabled

    torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def differentiable_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints, which only `.backward()` can pass, run as the other kind."""
    module: Any = torch.utils.checkpoint
    reentrant = getattr(module, "CheckpointFunction", None)
    if reentrant is None:
        yield
        return

    class Other:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

    module.CheckpointFunction = Other
    try:
        yield
    finally:
        module.CheckpointFunction = reentrant


@contextmanager
def standing_in(model: nn.Module, substitutes: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters and buffers, given by the `id` of these."""
    if not substitutes:
        yield
        return
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            held: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for table in held:
                tables.append((table, dict(table)))
                for name, tensor in table.items():
                    table[name] = substitutes.get(id(tensor), tensor)
        yield
    finally:
        for table, before in tables:
            table.update(before)


@contextmanager
def padding_held(model: nn.Module) -> Iterator[None]:
    """Embeddings look up their padding row as it is now, wherever their weights are moved.

    Their backward pass holds its gradient at zero: to it, what was looked up there is a constant.
    A tied output layer uses the same row, and moves with it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                for handle in _hold(module, module.padding_idx):
                    stack.callback(handle.remove)
        yield


def _hold(module: nn.Embedding, padding: int) -> list[RemovableHandle]:
    if "weight" not in module._parameters:  # it is made of others
        return []
    row = module.weight.detach()[[padding]]
    index = torch.tensor([padding], device=row.device)
    before: list[tuple[Any, bool]] = []

    def enter(module: Any, args: Any) -> None:
        moved = module._parameters["weight"]
        before.append((moved, module.sparse))
        # A sparse gradient could not go on to the weights behind the copy.
        module._parameters["weight"], module.sparse = moved.index_copy(0, index, row), False

    def leave(module: Any, args: Any, output: Any) -> None:
        module._parameters["weight"], module.sparse = before.pop()

    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]


def converted(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating point tensors in `dtype`."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        items = {key: converted(value, dtype) for key, value in batch.items()}
        return items if type(batch) is dict else _like(batch, items)
    if isinstance(batch, list | tuple):
        values = [converted(value, dtype) for value in batch]
        return getattr(batch, "_make", type(batch))(values)
    if is_dataclass(batch) and not isinstance(batch, type):
        record = copy.copy(batch)
        for part in fields(batch):
            value = converted(getattr(batch, part.name), dtype)
            object.__setattr__(record, part.name, value)
        return record
    return batch


def _like(batch: Any, items: dict[Any, Any]) -> Any:
    """Hugging Face's encodings are mappings with attributes of their own."""
    taken = copy.copy(batch)
    for key, value in items.items():
        taken[key] = value
    return taken


def random_streams() -> Any:
    """The positions of the global random streams, comparable."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    torch_streams = [torch.get_rng_state(), *devices]
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        [state.numpy().tobytes() for state in torch_streams],
    )
