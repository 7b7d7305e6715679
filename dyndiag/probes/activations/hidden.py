"""Following a forward pass of the probe batch: what each block and each activation puts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch, ForwardCall
from dyndiag.probes.activations.activation_functions import (
    PARTS,
    TWO_SIDED,
    Intercept,
    has_parts,
    only_applies,
)
from dyndiag.probes.activations.blocks import GATES
from dyndiag.probes.activations.features import feature_axis, hidden_of, samples
from dyndiag.probes.forward import undisturbed
from dyndiag.probes.predictions.outputs import one_pass
from dyndiag.state import TrainState

B = TypeVar("B")
U = TypeVar("U")


@dataclass
class Followed(Generic[B, U]):
    """What was made of each block's and each unit layer's outputs: by name, one item a call."""

    blocks: dict[str, list[B]] = field(default_factory=dict)
    """In the order in which they were first called."""
    units: dict[str, list[U]] = field(default_factory=dict)


def follow(
    state: TrainState,
    blocks: Collection[str],
    of_block: Callable[[Tensor, int], B],
    of_units: Callable[[Tensor, int, bool], U] | None = None,
) -> Followed[B, U]:
    """Run the probe batch through the model once, and make something of what it puts out.

    `of_block(rows, call)` gets the outputs of the named modules as (samples, features); `call`
    counts a module's calls, which are several where it is shared or there are micro-batches.
    `of_units(rows, call, two_sided)` gets the outputs of activations: modules (`nn.ReLU`, or ones
    that spell the function out, without weights), recurrent layers, and functions (`F.relu`,
    `torch.tanh`, …), which are named after the module that calls them. An activation that comes
    after several layers (a shared `self.relu`, a function in a loop over layers) is a unit layer
    of its own after each; after one layer that is called several times it is one.

    Left out are tokens that an `attention_mask` hides, what is no floating tensor, gates
    (sigmoid, softmax), functions of attention scores or after the last layer (a head's), and
    units of which cannot be told where they are. Experts that share one activation are one layer.
    Inside scripted modules nothing is seen. Cost: one forward.
    """
    assert state.probe is not None
    watched = _Watch(state.model, blocks, of_block, of_units)
    loss_fn = state.loss_fn

    def from_the_start(model: nn.Module, batch: Batch) -> Tensor:
        assert loss_fn is not None
        watched.start(batch)  # a loss that is made of derivatives is tried twice
        return loss_fn(model, batch)

    for batch in state.probe.batches:
        watched.start(batch)
        with watched.watching():
            one_pass(state.model, None if loss_fn is None else from_the_start, batch)
        watched.finish()
    return watched.found


@dataclass
class _Call:
    """A module under way."""

    module: nn.Module
    applies: str = ""
    """The activation function that it applies."""


class _Watch(Generic[B, U]):
    """The modules under way, and what has been seen."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Collection[str],
        of_block: Callable[[Tensor, int], B],
        of_units: Callable[[Tensor, int, bool], U] | None,
    ) -> None:
        self._model, self._of_block, self._of_units = model, of_block, of_units
        self._names = {module: name for name, module in model.named_modules()}
        self._blocks = set(blocks)
        self._unit_names: dict[tuple[Any, ...], str] = {}
        self.found: Followed[B, U] = Followed()

    def start(self, batch: Batch) -> None:
        """A forward of this batch begins; what was seen of one that has failed is forgotten."""
        self._stack: list[_Call] = []
        self._after: nn.Module | None = None
        self._visible = _mask(batch.kwargs if isinstance(batch, ForwardCall) else batch)
        self._seen_blocks: list[tuple[str, B]] = []
        self._seen_units: list[tuple[str, U]] = []
        self._unfollowed: list[int] = []
        self._calls: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the model within the body only."""
        handles = [self._model.register_forward_pre_hook(self._find_mask, with_kwargs=True)]
        for module in self._names:
            if not isinstance(module, torch.jit.ScriptModule):  # which take no hooks
                handles += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
        try:
            with Intercept(self._read_function):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """The forward has ended well: what was seen of it counts."""
        if self._after is not None:
            for i in reversed(self._unfollowed):
                del self._seen_units[i]
        for name, block in self._seen_blocks:
            self.found.blocks.setdefault(name, []).append(block)
        for name, units in self._seen_units:
            self.found.units.setdefault(name, []).append(units)

    def _find_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = _mask(kwargs)
        self._visible = self._visible if mask is None else mask

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(_Call(module))

    @torch.no_grad()
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not any(call.module is module for call in self._stack):
            return
        while (call := self._stack.pop()).module is not module:
            pass  # it was left by an error that somebody caught
        if output is None or not undisturbed():
            return
        name = self._names[module] or "model"
        if name in self._blocks:
            self._read_block(name, output)
        if call.applies:
            self._read_units(name, call.applies, output)
            return
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            self._read_units(name, "tanh", output)
        if _has_weights(module):
            self._after, self._unfollowed = module, []

    @torch.no_grad()
    def _read_function(self, function: str, output: Any) -> None:
        if not self._stack or not undisturbed():
            return
        here = self._stack[-1]
        if only_applies(here.module):
            here.applies = "" if isinstance(here.module, GATES) else function
        elif function not in PARTS:
            name = self._names[here.module]
            before = len(self._seen_units)
            self._read_units(f"{name}.{function}" if name else function, function, output)
            self._unfollowed += range(before, len(self._seen_units))

    def _read_block(self, name: str, output: Any) -> None:
        hidden = hidden_of(output)
        if hidden is None:
            return
        axis = feature_axis(hidden.shape, self._after)
        if axis is None:
            axis = -1 if hidden.dim() == 3 else 1
        rows = samples(hidden, axis, self._visible)
        if len(rows):
            call = self._count("block", name) + len(self.found.blocks.get(name, ()))
            self._seen_blocks.append((name, self._of_block(rows, call)))

    def _read_units(self, name: str, function: str, output: Any) -> None:
        hidden = hidden_of(output)
        axis = None if hidden is None else feature_axis(hidden.shape, self._after)
        if hidden is None or axis is None or self._of_units is None:
            return
        rows = samples(hidden, axis, self._visible)
        if len(rows):
            name = self._unit_name(name, function, self._after, rows.shape[1])
            call = self._count("units", name) + len(self.found.units.get(name, ()))
            self._seen_units.append((name, self._of_units(rows, call, function in TWO_SIDED)))

    def _unit_name(self, name: str, *where: Any) -> str:
        key = (name, *where)
        if key not in self._unit_names:
            again = sum(known[0] == name for known in self._unit_names)
            self._unit_names[key] = f"{name}.{again + 1}" if again else name
        return self._unit_names[key]

    def _count(self, kind: str, name: str) -> int:
        self._calls[kind, name] += 1
        return self._calls[kind, name] - 1


def _mask(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _has_weights(module: nn.Module) -> bool:
    return not has_parts(module) and any(True for _ in module.parameters())
