"""The loss of each example of the probe batch by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dyndiag.batches import Batch, ForwardCall
from dyndiag.curvature.data import cut, number_of_examples
from dyndiag.probes.predictions.outputs import Pass, one_pass, value_without_graph
from dyndiag.probes.predictions.targets import targets_of
from dyndiag.state import TrainState


@torch.no_grad()
def example_losses(state: TrainState) -> tuple[Tensor, Tensor] | None:
    """The loss of each example of the probe batch, (examples,), and which examples have one.

    By cross-entropy from the logits of one forward, where that is the loss of the batch (the mean
    over an example's tokens); else the loss function's value on each example alone, which takes
    as many forwards of one example. None without both. Raises DyndiagError for a batch that cannot
    be cut.
    """
    assert state.probe is not None
    losses: list[Tensor] = []
    known: list[Tensor] = []
    for batch in state.probe.batches:
        passed = one_pass(state.model, state.loss_fn, batch)
        found = _by_cross_entropy(passed, trusted=state.loss_fn is None)
        if found is None and state.loss_fn is not None:
            alone = torch.stack([_one_loss(state, example) for example in examples_of(batch)])
            found = alone, torch.ones_like(alone, dtype=torch.bool)
        if found is None:
            return None
        losses.append(found[0].float())
        known.append(found[1])
    return torch.cat(losses), torch.cat(known)


def examples_of(batch: Batch) -> list[Batch]:
    """Batches of one example each, whose loss is that example's mean."""
    if isinstance(batch, ForwardCall) and "num_items_in_batch" in batch.kwargs:
        kwargs = {k: v for k, v in batch.kwargs.items() if k != "num_items_in_batch"}
        batch = replace(batch, kwargs=kwargs)  # it would make a share of the step's mean of it
    return cut(batch, 1)


def chosen_examples(state: TrainState, indices: Tensor) -> Iterator[Batch]:
    """Those examples of the probe batch, as batches of one."""
    assert state.probe is not None
    every = [example for batch in state.probe.batches for example in examples_of(batch)]
    return (every[i] for i in indices.tolist())


def _one_loss(state: TrainState, example: Batch) -> Tensor:
    loss_fn = state.loss_fn
    assert loss_fn is not None
    return value_without_graph(lambda: loss_fn(state.model, example)).reshape(())


def _by_cross_entropy(passed: Pass, trusted: bool) -> tuple[Tensor, Tensor] | None:
    targets = targets_of(passed)
    count = number_of_examples(passed.batch)
    if targets is None or not count or len(targets.losses) % count:
        return None
    if not (targets.verified or trusted):
        return None
    tokens = targets.count.view(count, -1).sum(dim=1)
    return targets.losses.view(count, -1).sum(dim=1) / tokens.clamp_min(1), tokens > 0
