"""Output logits of the training's own forward passes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import ForwardCall, loss_of
from dyndiag.probes.forward import logits_of, visible
from dyndiag.probes.logits import output_statistics
from dyndiag.schedule import Every, WithinShare
from dyndiag.state import Measurements


class OutputLogits:
    """How large the output logits y are, over all visible positions; in nats, signed.

    - `logits/max`, at every step: the largest.

    At every 11th step, and after 500 steps there or at odd multiples, within 0.01 % of the time
    of the training's thread:

    - `logits/log_partition`: mean of ln Z = ln Σ e^y. It drifts where output logits diverge while
      the loss is still fine (Wortsman et al. 2023, arXiv 2309.14322).
    - `logits/mean`: over positions and classes.
    - `logits/collapse`, in [0, 1]: share of positions where Σ e^(y − max y) equals exactly 1 in
      the logits' dtype (added up in float32, as torch's kernels do for half precision, then
      rounded). There the loss and the gradient of the largest logit vanish by absorption: softmax
      collapse (Prieto et al. 2025, arXiv 2501.04697), no harm while the largest is wrong. Of two
      classes it takes a gap of 36.74 in float64, 16.64 in float32, 7.62 in float16, 5.55 in
      bfloat16.
    - `logits/smallest_gap`: the least, over positions, of the largest less the second largest;
      it grows before the collapse does, and knows no dtype.
    - `logits/target`, mean logit of the target, and `logits/zero_loss`, share of targets with a
      loss of exactly 0 in the logits' dtype: only where the model is given `labels`, and for
      sequences returns a loss, which tells whether they are shifted.

    `logits/collapse` misleads where the loss runs in another precision than the logits have: a
    loss that turns half-precision logits into float32 (as under autocast), or a kernel that keeps
    the sum in float32, collapses at float32's gap only.

    Cost: one read of the logits; for the others an exponential and some more reads, in blocks:
    never a second array of the logits' size. No host sync.
    """

    def __init__(self) -> None:
        self._all_due = WithinShare(0.0001, Every(11))
        self._all = self._begun = False
        self._highest: list[Tensor | float] = []
        self._gap: Tensor | None = None
        self._sums: dict[str, tuple[Tensor, Tensor | float]] = {}

    def started(self, step: int, outermost: nn.Module) -> None:
        if not self._begun:  # the step's first forward
            self._begun = True
            self._all = self._all_due.due(step, time.perf_counter())

    def finished(self, call: ForwardCall, output: Any) -> None:
        found = logits_of(output)
        if found is None:
            return
        logits = found.detach()
        mask = visible(call, logits)
        if self._all:
            began = time.perf_counter()
            highest = self._read(call, output, logits, mask)
            self._all_due.paid(time.perf_counter() - began)
        elif mask is None:
            highest = logits.max()  # a third quicker than amax, and NaN stays NaN, too
        else:
            highest = logits.amax(dim=-1).masked_fill(~mask, -torch.inf).amax()
        # On a CPU a tensor of one number, kept amid the training's own, may make its allocator ask
        # the system for memory anew.
        self._highest.append(highest.item() if highest.is_cpu else highest)

    def collect(self) -> Measurements:
        seen: Measurements = {}
        if self._highest:
            seen["logits/max"] = _largest(self._highest)
        if self._gap is not None:
            seen["logits/smallest_gap"] = self._gap
        for name, (total, count) in self._sums.items():
            seen[f"logits/{name}"] = total / count
        self._highest, self._gap, self._begun = [], None, False
        self._sums = {}
        return seen

    @torch.no_grad()
    def _read(self, call: ForwardCall, output: Any, logits: Tensor, mask: Tensor | None) -> Tensor:
        rows = output_statistics.rows(logits)
        labels = call.kwargs.get("labels")
        if isinstance(labels, Tensor):
            loss, items = loss_of(output), call.kwargs.get("num_items_in_batch")
            targets = output_statistics.targets(logits, rows, labels, loss, items)
            if targets is not None:
                self._add("target", targets.total, targets.positions)
                self._add("zero_loss", targets.zero_loss, targets.positions)
        highest, gap = rows.highest, rows.gap
        positions: Tensor | float = highest.numel()
        sums = [rows.log_partition, rows.total, rows.collapsed]
        if mask is not None:
            shown = mask.flatten()
            positions = shown.sum(dtype=torch.float64)
            highest = highest.masked_fill(~shown, -torch.inf)
            gap = gap.masked_fill(~shown, torch.inf)
            sums = [each.where(shown, 0) for each in sums]
        log_partition, total, collapsed = (each.sum(dtype=torch.float64) for each in sums)
        self._add("log_partition", log_partition, positions)
        self._add("mean", total, positions * logits.shape[-1])
        self._add("collapse", collapsed, positions)
        least = gap.amin()
        self._gap = least if self._gap is None else torch.minimum(self._gap, least)
        return highest.amax()

    def _add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + total, before[1] + count)


def _largest(values: list[Tensor | float]) -> Tensor | float:
    if len(values) == 1:
        return values[0]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64).amax()  # NaN, unlike max, stays NaN
    return torch.stack(tensors).amax()
