"""What the model predicts on the fixed probe batch, and how that changes between samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch, ForwardCall, LossFunction, MicroBatches, check_scalar_loss
from dyndiag.errors import DyndiagError
from dyndiag.probes.forward import logits_of
from dyndiag.schedule import FixedInterval
from dyndiag.state import Measurements, TrainState

_ROWS = 4096
"""Positions held at a time: at a vocabulary of 50,000 whole arrays cost four times as much."""
_NUMBERS = 2**18


class Predictions:
    """`predictions/entropy`, `/jsd`, `/instability` and `/loss` on the probe batch, eval mode.

    With p_t(x) = softmax of the logits: H = mean over positions of −Σ p ln p; J = mean of
    JSD(p_{t−1}, p_t) = H(m) − ½(H(p_{t−1}) + H(p_t)), m their mean, in [0, ln 2]; instability
    I = J + H (weight 1 is ours; after arXiv 2602.02863). Nats. J and I need a sample before this
    one at the same distance; where the interval changed they are left out.

    Cost: one forward of the probe batch, at a fixed odd interval; keeps the last distribution
    (positions × classes, float32).
    """

    name = "Predictions"

    def __init__(self, due: FixedInterval) -> None:
        self.due = due
        self._before: Tensor | None = None
        self._before_step = 0
        self._distance: int | None = None

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        loss, logits = loss_and_logits(state.model, state.loss_fn, state.probe)
        seen: Measurements = {} if loss is None else {"predictions/loss": loss}
        if logits is None:
            return seen
        now = torch.log_softmax(logits.float(), dim=-1).flatten(0, -2)
        entropy = _mean(_entropy, now)
        seen["predictions/entropy"] = entropy
        distance = state.step - self._before_step
        comparable = self._before is not None and self._before.shape == now.shape
        if comparable and distance == self.due.interval:
            assert self._before is not None
            jsd = _mean(jensen_shannon_divergence, self._before, now)
            seen["predictions/jsd"] = jsd
            seen["predictions/instability"] = jsd + entropy
        self._before, self._before_step = now, state.step
        return seen


def jensen_shannon_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD of rows of log-probabilities, (rows, classes) → (rows,), nats, in [0, ln 2].

    >>> p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(jensen_shannon_divergence(p, q).item(), 6)
    0.101749
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = 0.5 * (_entropy_like(log_p, log_p - log_m) + _entropy_like(log_q, log_q - log_m))
    return divergence.clamp(0.0, math.log(2))


def _entropy(log_p: Tensor) -> Tensor:
    return _entropy_like(log_p, -log_p).clamp_min(0.0)


def _entropy_like(log_p: Tensor, of: Tensor) -> Tensor:
    # p · ln p is 0 at p = 0, where the product would be NaN.
    p = log_p.exp()
    return (p * of).where(p > 0, 0.0).sum(dim=-1)


def _mean(of: Any, *rows: Tensor) -> Tensor:
    """Mean over positions of a function of rows, a block of rows at a time."""
    block = max(1, min(_ROWS, _NUMBERS // rows[0].shape[-1]))
    blocks = zip(*(part.split(block) for part in rows), strict=True)
    total = torch.stack([of(*parts).sum(dtype=torch.float64) for parts in blocks]).sum()
    return total / rows[0].shape[0]


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """The outputs of the model's outermost forwards; of its direct children's, if it has none."""
    whole: list[Any] = []
    parts: list[Any] = []
    handles = [model.register_forward_hook(lambda m, args, output: whole.append(output))]
    handles += [
        child.register_forward_hook(lambda m, args, output: parts.append(output))
        for child in model.children()
    ]
    found: list[Any] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += whole or parts


def loss_and_logits(
    model: nn.Module, loss_fn: LossFunction | None, batches: MicroBatches
) -> tuple[Tensor | None, Tensor | None]:
    """The loss and the class scores of one forward; None for what there is none of.

    Scores have shape (positions, classes), those of several micro-batches one after the other.
    """
    parts: list[Tensor] = []
    losses: list[Tensor] = []
    for batch, weight in zip(batches.batches, batches.weights, strict=True):
        loss, logits = _forward(model, loss_fn, batch)
        if loss is not None:
            losses.append(weight * loss)
        if logits is not None:
            parts.append(logits.flatten(0, -2))
    return (
        torch.stack(losses).sum() if losses else None,
        torch.cat(parts) if len(parts) == len(batches.batches) else None,
    )


def value_without_graph(loss: Callable[[], Tensor]) -> Tensor:
    """The loss, detached; with a graph meanwhile only if it is itself made of derivatives."""
    try:
        with torch.no_grad():
            return loss().detach()
    except RuntimeError:
        with torch.enable_grad():
            return loss().detach()


def _forward(
    model: nn.Module, loss_fn: LossFunction | None, batch: Batch
) -> tuple[Tensor | None, Tensor | None]:
    loss: Tensor | None = None
    with _outputs(model) as outputs:
        if loss_fn is not None:
            loss = value_without_graph(lambda: loss_fn(model, batch))
            check_scalar_loss(loss)
        elif isinstance(batch, ForwardCall):
            model(*batch.args, **batch.kwargs)
        elif isinstance(batch, dict):
            model(**batch)
        else:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    found = [logits for output in outputs if (logits := logits_of(output)) is not None]
    return loss, found[-1].detach() if found else None


def correct_predictions(
    model: nn.Module, loss_fn: LossFunction | None, batch: Batch
) -> tuple[Tensor, int]:
    """How many predictions are right (0-d tensor), out of how many, on one batch.

    The prediction is the largest of the output's class scores; the target is the batch's integer
    tensor of the scores' shape less the classes (under `labels`, `label`, `targets`, `target`,
    `y`, or the last such). Targets of −100 do not count. Raises DyndiagError if there is none.
    """
    _, logits = _forward(model, loss_fn, batch)
    if logits is None:
        raise DyndiagError(
            "the model's output holds no class scores of shape (…, classes), so there is no "
            "accuracy to measure: return logits, or an output with .logits"
        )
    target = _target(batch, logits)
    counted = target != -100
    right = (logits.argmax(dim=-1) == target) & counted
    return right.sum(), int(counted.sum())


def _target(batch: Batch, logits: Tensor) -> Tensor:
    named = dict(_named_tensors(batch))
    fitting = {
        name: tensor
        for name, tensor in named.items()
        if tensor.shape == logits.shape[:-1]
        and not tensor.is_floating_point()
        and tensor.dtype != torch.bool
    }
    if not fitting:
        raise DyndiagError(
            f"no target found in the evaluation batch: expected an integer tensor of shape "
            f"{tuple(logits.shape[:-1])}, found "
            f"{', '.join(str(tuple(t.shape)) for t in named.values()) or 'no tensor'}"
        )
    for name in ("labels", "label", "targets", "target", "y"):
        if name in fitting:
            return fitting[name].to(logits.device)
    return list(fitting.values())[-1].to(logits.device)


def _named_tensors(batch: Batch, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, dict):
        for key, item in batch.items():
            yield from _named_tensors(item, str(key))
    elif isinstance(batch, tuple | list):
        for i, item in enumerate(batch):
            yield from _named_tensors(item, f"{name}{i}")
