"""Watching the training's own forward passes, without a pass of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dyndiag.batches import ForwardCall, MicroBatches, loss_of
from dyndiag.curvature.engines.surroundings import differentiable_checkpoints
from dyndiag.state import Measurements

Boundary = Callable[[str], AbstractContextManager[None]]
"""What keeps a failure of the named part away from the training: the monitor's one catch."""


def unguarded(name: str) -> AbstractContextManager[None]:
    """No boundary: failures come through."""
    return nullcontext()


_measurements: list[object] = []  # under way in this process, by whichever monitor


@contextmanager
def unwatched() -> Iterator[None]:
    """The body's forward passes are a measurement: no watch takes them for the training's.

    Reentrant checkpoints in them, which only `.backward()` can pass, run as the other kind.
    """
    _measurements.append(None)
    try:
        with differentiable_checkpoints():
            yield
    finally:
        _measurements.pop()


def undisturbed() -> bool:
    """Whether operations of ours go unnoticed here.

    Not in a functorch transform or a trace, which they would become a part of, and not under a
    dispatch mode (selective checkpointing, FLOP counters, fake tensors), which would count them
    among the model's own.
    """
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )


class Hook:
    """A module hook that copies and pickles as a hook that does nothing.

    A model under watch can still be deep-copied, saved whole (and loaded where there is no
    dyndiag) or sent to another process; inside compiled code the hook does nothing either, so it
    breaks no graph.
    """

    def __init__(
        self,
        call: Callable[..., None] | None = None,
        name: str = "",
        boundary: Boundary = unguarded,
    ) -> None:
        self._call, self._name, self._boundary = call, name, boundary

    def __call__(self, *args: Any) -> None:
        if self._call is None or torch.compiler.is_compiling():
            return
        with self._boundary(self._name):
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (nullcontext(), "__exit__"))  # takes anything, does nothing


class Observer(Protocol):
    """Reads something off a forward pass of the training."""

    def started(self, step: int, outermost: nn.Module) -> None: ...
    def finished(self, call: ForwardCall, output: Any) -> None: ...
    def collect(self) -> Measurements:
        """What was seen since the last call, over all micro-batches."""
        ...


class ForwardWatch:
    """Tells observers of each forward pass that the training takes, and keeps its batch and loss.

    A training's forward is an outermost call of the model (or, where a trainer never calls the
    model itself, of one of its direct children) with gradients on. Not the training's are
    measurements, and forwards in eval mode between steps that are taken in train mode.
    Cost: two Python calls a forward; as many for each direct child until the model is called.
    """

    def __init__(
        self, model: nn.Module, observers: list[Observer], boundary: Boundary = unguarded
    ) -> None:
        self._model = model
        self._observers = observers
        self._depth = 0
        self._watching = self._whole_seen = False
        self._trains = self._train_seen = False
        self.step = 0
        self.before: Callable[[], None] | None = None
        """Called when a forward of the training begins."""
        self._last: ForwardCall | None = None
        self._with_loss: list[tuple[ForwardCall, Tensor]] = []
        self._unused: set[int] = set()
        """Which of these losses no backward pass has begun from, or come through, so far."""
        self._hooks = [Hook(call, "ForwardWatch", boundary) for call in (self._enter, self._leave)]
        self._handles = self._watch(model)
        inside = () if is_compiled(model) else model.children()
        self._inside = [handle for child in inside for handle in self._watch(child)]

    def _watch(self, module: nn.Module) -> list[RemovableHandle]:
        enter, leave = self._hooks
        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.collect()
        for handle in (*self._handles, *self._inside):
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        self._whole_seen |= module is self._model
        if self._depth > 1 or _measurements or not torch.is_grad_enabled():
            return
        if (self._whole_seen and module is not self._model) or not undisturbed():
            return
        if (self._trains or self._train_seen) and not self._model.training:
            return
        if self._model.training and not self._train_seen:
            self._forget()  # what came before it was no training
            self._train_seen = True
        if self.before is not None:
            self.before()
        self._watching = True
        for observer in self._observers:
            observer.started(self.step, module)

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth > 0:
            return
        if self._inside and self._whole_seen:  # its parts alone are no forward of the training
            for handle in self._inside:
                handle.remove()
            self._inside = []
        if not self._watching:
            return
        self._watching = False
        call = ForwardCall(args, kwargs)
        for observer in self._observers:
            observer.finished(call, output)
        if module is self._model and output is not None:  # else it has failed
            self._last, loss = call, loss_of(output)
            if loss is not None:
                if loss.grad_fn is not None:
                    number = len(self._with_loss)
                    self._unused.add(number)
                    unused = self._unused  # of this step: a later one has a set of its own
                    loss.grad_fn.register_prehook(lambda gradients: unused.discard(number))
                self._with_loss.append((call, loss.detach().clone()))

    def collect(
        self, *, trained: bool = False
    ) -> tuple[MicroBatches | None, Tensor | None, Measurements]:
        """The batches, loss and signals of the forwards since the last call.

        `trained`: a step was taken on them, so an output's own loss that no backward pass came
        through is not what was trained on (RL trainers, distillation).
        """
        if self._watching:  # a forward was interrupted: Ctrl-C runs no hooks
            self._depth, self._watching = 0, False
            for observer in self._observers:
                observer.finished(ForwardCall(), None)
        batches, loss = None, None
        if trained:
            self._with_loss = [
                one for i, one in enumerate(self._with_loss) if i not in self._unused
            ]
        if self._with_loss:
            calls = tuple(call for call, _ in self._with_loss)
            batches = MicroBatches(calls, _loss_weights(calls))
            parts = zip(batches.weights, self._with_loss, strict=True)
            loss = torch.stack([weight * part for weight, (_, part) in parts]).sum()
        elif self._last is not None:
            batches = MicroBatches((self._last,))
        signals: Measurements = {}
        for observer in self._observers:
            signals |= observer.collect()
        self._last, self._with_loss, self._unused = None, [], set()
        self._trains, self._train_seen = self._train_seen, False
        return batches, loss, signals

    def _forget(self) -> None:
        for observer in self._observers:
            observer.collect()
        self._last, self._with_loss, self._unused = None, [], set()


def is_compiled(module: nn.Module) -> bool:
    """Whether the module's forward runs as compiled code, where hooks on its parts do not fire."""
    wrapped = type(module).__name__ == "OptimizedModule"
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _loss_weights(calls: tuple[ForwardCall, ...]) -> tuple[float, ...]:
    # A trainer that tells the model how many tokens the whole step holds gets from each
    # micro-batch its share of the step's mean; all others average the micro-batches' means.
    if all(call.kwargs.get("num_items_in_batch") is not None for call in calls):
        return tuple(1.0 for _ in calls)
    return tuple(1 / len(calls) for _ in calls)


def logits_of(output: Any) -> Tensor | None:
    """Class scores in a model's output, shape (…, classes); None where there are none.

    A floating tensor with two or three dimensions (positions × classes) and more than one class:
    the output itself, its `.logits`, or the first such tensor of a tuple.
    """
    if not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = output.get("logits")
        elif hasattr(output, "logits"):
            output = output.logits
        if isinstance(output, tuple | list):
            output = next((item for item in output if _are_logits(item)), None)
    return output if _are_logits(output) else None


def _are_logits(item: Any) -> bool:
    return (
        isinstance(item, Tensor)
        and item.is_floating_point()
        and item.dim() in (2, 3)
        and item.shape[-1] > 1
        and item.numel() > 0
    )


def visible(call: ForwardCall, logits: Tensor) -> Tensor | None:
    """Mask (…,) of the positions that no `attention_mask` hides; None if all are visible."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return mask.to(torch.bool)
    return None
