"""One forward of the probe batch without a graph: its loss, its class scores, who is masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch, ForwardCall, LossFunction, MicroBatches, check_scalar_loss
from dyndiag.probes.forward import logits_of, visible


@dataclass(frozen=True)
class Pass:
    """What one micro-batch's forward gave."""

    batch: Batch
    call: ForwardCall
    """How the model was called by whoever called it."""
    loss: Tensor | None
    logits: Tensor | None
    """(…, classes), as the model gave them; None where it gave no class scores."""

    @property
    def loss_tells(self) -> bool:
        """Whether the loss can tell what it was made of: not if it is infinite or NaN."""
        return self.loss is None or bool(self.loss.isfinite().all())

    @property
    def scores(self) -> Tensor:
        """The logits as (positions, classes), with their graph where gradients are on."""
        assert self.logits is not None
        return self.logits.reshape(-1, self.logits.shape[-1])

    @property
    def visible(self) -> Tensor | None:
        """Which positions no attention mask hides, (positions,); None if none is hidden."""
        assert self.logits is not None
        mask = visible(self.call, self.logits)
        if mask is None and isinstance(self.batch, Mapping):
            mask = visible(ForwardCall((), self.batch), self.logits)
        return None if mask is None else mask.to(self.logits.device).flatten()


def passes(model: nn.Module, loss_fn: LossFunction | None, batches: MicroBatches) -> Iterator[Pass]:
    """One forward of each micro-batch, as they are asked for."""
    for batch in batches.batches:
        yield one_pass(model, loss_fn, batch)


def one_pass(
    model: nn.Module, loss_fn: LossFunction | None, batch: Batch, graph: bool = False
) -> Pass:
    """One forward of a batch: by the loss function, or of the model itself without one.

    Loss and logits are detached, but with `graph`, where gradients are on.
    """
    loss: Tensor | None = None
    with _outputs(model) as outputs:
        if loss_fn is not None:
            value = partial(loss_fn, model, batch)
            loss = value() if graph else value_without_graph(value)
            check_scalar_loss(loss)
        elif isinstance(batch, ForwardCall):
            model(*batch.args, **batch.kwargs)
        elif isinstance(batch, Mapping):
            model(**batch)
        else:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    for call, output in reversed(outputs):
        logits = logits_of(output)
        if logits is not None:
            return Pass(batch, call, loss, logits if graph else logits.detach())
    return Pass(batch, ForwardCall(), loss, None)


def value_without_graph(loss: Callable[[], Tensor]) -> Tensor:
    """The loss, detached; with a graph meanwhile only if it is itself made of derivatives."""
    try:
        with torch.no_grad():
            return loss().detach()
    except RuntimeError:
        with torch.enable_grad():
            return loss().detach()


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[tuple[ForwardCall, Any]]]:
    """Calls and outputs of the model's outermost forwards; of its direct children's, without any.

    Filled when the body is done.
    """
    whole: list[tuple[ForwardCall, Any]] = []
    parts: list[tuple[ForwardCall, Any]] = []

    def keep_in(kept: list[tuple[ForwardCall, Any]]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            kept.append((ForwardCall(args, kwargs), output))

        return keep

    handles = [model.register_forward_hook(keep_in(whole), with_kwargs=True)]
    handles += [
        child.register_forward_hook(keep_in(parts), with_kwargs=True) for child in model.children()
    ]
    found: list[tuple[ForwardCall, Any]] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += whole or parts
