"""Output logits of the training's own forward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndiag.batches import ForwardCall
from dyndiag.probes.forward import logits_of, visible
from dyndiag.schedule import Every
from dyndiag.state import Measurements


class OutputLogits:
    """`logits/max`, at every step, and `logits/log_partition`, at every 11th.

    The largest logit over all visible positions (signed), and the mean over them of
    ln Z = logsumexp(y) (Wortsman et al. 2023, arXiv 2309.14322, for its drift), in nats.
    Cost: one read of the logits; at every 11th step an exponential per logit more. No host sync.
    """

    def __init__(self) -> None:
        self._log_partition_due = Every(11)
        self._step = 0
        self._max: Tensor | None = None
        self._log_partition: Tensor | None = None
        self._positions: Tensor | float = 0.0

    def started(self, step: int) -> None:
        self._step = step

    @torch.no_grad()
    def finished(self, call: ForwardCall, output: Any) -> None:
        found = logits_of(output)
        if found is None:
            return
        logits = found.detach()
        mask = visible(call, logits)
        if mask is None:
            highest = logits.amax()
        else:
            highest = logits.amax(dim=-1).masked_fill(~mask, -torch.inf).amax()
        self._max = highest if self._max is None else torch.maximum(self._max, highest)
        if self._log_partition_due.due(self._step):
            log_z = torch.logsumexp(logits.float(), dim=-1)
            if mask is not None:
                log_z = log_z.where(mask, 0.0)
            total = log_z.sum(dtype=torch.float64)
            self._log_partition = (
                total if self._log_partition is None else self._log_partition + total
            )
            self._positions = self._positions + (log_z.numel() if mask is None else mask.sum())

    def collect(self) -> Measurements:
        seen: Measurements = {}
        if self._max is not None:
            seen["logits/max"] = self._max
        if self._log_partition is not None:
            seen["logits/log_partition"] = self._log_partition / self._positions
        self._max = self._log_partition = None
        self._positions = 0.0
        return seen
