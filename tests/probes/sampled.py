"""What a sampled probe is given, and what it comes to, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dyndiag.batches import LossFunction, MicroBatches
from dyndiag.guard import no_trace
from dyndiag.probes import Probe
from dyndiag.rows import Rows
from dyndiag.state import TrainState
from tests.models import cross_entropy


def state_of(
    model: nn.Module, *batches: Any, loss_fn: LossFunction | None = cross_entropy, step: int = 0
) -> TrainState:
    named = list(model.named_parameters())
    return TrainState(
        step,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        tuple(p for _, p in named),
        tuple(name for name, _ in named),
        loss_fn=loss_fn,
        probe=MicroBatches(batches),
    )


def taken(probe: Probe, state: TrainState) -> dict[str, Any]:
    """The numbers of a sample by series, taken inside the guard as the monitor does."""
    with no_trace(state.model, state.optimizer, state.loss_fn):
        seen = probe.measure(state)
    rows = Rows()
    rows.add(state.step, seen)
    found = rows.to_host()
    return found[0][1] if found else {}
