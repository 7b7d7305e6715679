"""What the model predicts on the fixed probe batch, and how that changes between samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndiag.probes.predictions.calibration import calibration_error
from dyndiag.probes.predictions.divergence import (
    Distributions,
    Positions,
    compare,
)
from dyndiag.probes.predictions.outputs import Pass, passes
from dyndiag.probes.predictions.targets import targets_of
from dyndiag.schedule import FixedInterval
from dyndiag.state import Measurements, TrainState


class Predictions:
    """Series `predictions/…` of the probe batch, eval mode, all from one forward.

    With p_t(x) = softmax of the logits at position x of sample t, means over the positions that
    no attention mask hides:

    - `entropy` H = mean −Σ p ln p, nats, in [0, ln classes]; `confidence` = mean max p.
    - `jsd` J = mean JSD(p_{t−1}, p_t) = mean H(m) − ½(H(p_{t−1}) + H(p_t)), m their mean, in
      [0, ln 2]; `flips` = share of positions whose likeliest class changed.
    - `instability` I = J + H (weight 1 is ours; after arXiv 2602.02863), in nats;
      `instability_peak`, the largest I so far, and `instability_peak_step`, when it came (the
      first of equal ones).
    - `loss` of the loss function; where targets are found in the batch (see `targets_of`),
      `accuracy` and `calibration_error` (15 bins, Guo et al. 2017, arXiv 1706.04599).

    J, flips and I need a sample before this one at the same distance: for a smooth drift J grows
    with the square of the distance. Where the interval changes they are left out once, and the
    peak begins anew.

    Cost: one forward of the probe batch, at a fixed odd interval; keeps the last logits
    (positions × classes, in their own precision). Misleads: a network begins near H = ln classes,
    so that without a warm start the first samples hold the peak; the calibration error is biased
    up on few positions; on a probe batch that is trained on, all of it is of seen data.
    """

    name = "Predictions"

    def __init__(self, due: FixedInterval) -> None:
        self.due = due
        self._before: list[Distributions] = []
        self._before_step = 0
        self._peak: tuple[int, Tensor, Tensor] | None = None
        """Interval, largest instability over it, step."""

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        before, self._before = self._before, []
        near = state.step - self._before_step == self.due.interval
        losses: list[Tensor] = []
        parts: list[_Part] = []
        for i, passed in enumerate(passes(state.model, state.loss_fn, state.probe)):
            if passed.loss is not None:
                losses.append(state.probe.weights[i] * passed.loss)
            if passed.logits is not None:
                now, found = compare(passed.scores, before[i] if i < len(before) else None, near)
                self._before.append(now)
                parts.append(_part(passed, now, found))
        seen: Measurements = {"predictions/loss": torch.stack(losses).sum()} if losses else {}
        if len(parts) < len(state.probe.batches):
            self._before = []
            return seen
        self._before_step = state.step
        seen |= _means(parts) | _against_targets(parts)
        return seen | self._instability(seen, state.step)

    def _instability(self, seen: Measurements, step: int) -> Measurements:
        if "predictions/jsd" not in seen:
            return {}
        now = torch.as_tensor(seen["predictions/jsd"]) + torch.as_tensor(
            seen["predictions/entropy"]
        )
        at = torch.full_like(now, step)
        if self._peak is not None and self._peak[0] == self.due.interval:
            highest, when = self._peak[1].to(now), self._peak[2].to(now)
            higher = (now > highest) | highest.isnan()
            at, highest = at.where(higher, when), now.where(higher, highest)
        else:
            highest = now
        self._peak = (self.due.interval, highest, at)
        return {
            "predictions/instability": now,
            "predictions/instability_peak": highest,
            "predictions/instability_peak_step": at,
        }


@dataclass(frozen=True)
class _Part:
    """What was measured on one micro-batch, (positions,) each."""

    found: Positions
    visible: Tensor
    right: Tensor | None
    """Whether the likeliest class is the target; None where no targets are found."""
    count: Tensor | None
    """Whether there is a target."""


def _part(passed: Pass, now: Distributions, found: Positions) -> _Part:
    targets = targets_of(passed, now.log_partition)
    visible = torch.ones_like(now.best, dtype=torch.bool)
    if passed.visible is not None:
        visible = passed.visible
    if targets is None:
        return _Part(found, visible, None, None)
    return _Part(found, visible, now.best == targets.classes, targets.count)


def _means(parts: Sequence[_Part]) -> Measurements:
    visible = torch.cat([part.visible for part in parts])
    if not bool(visible.any()):
        return {}
    every: dict[str, list[Tensor | None]] = {
        "predictions/entropy": [part.found.entropy for part in parts],
        "predictions/confidence": [part.found.confidence for part in parts],
        "predictions/jsd": [part.found.jsd for part in parts],
        "predictions/flips": [part.found.flipped for part in parts],
    }
    seen: Measurements = {}
    for name, values in every.items():
        known = [value for value in values if value is not None]
        if len(known) == len(parts):
            total = torch.cat(known).double().where(visible, 0.0).sum()
            seen[name] = total / visible.sum()
    return seen


def _against_targets(parts: Sequence[_Part]) -> Measurements:
    right = [part.right for part in parts if part.right is not None]
    counts = [part.count for part in parts if part.count is not None]
    if len(right) < len(parts) or not bool((count := torch.cat(counts)).any()):
        return {}
    confidence = torch.cat([part.found.confidence for part in parts])
    hits = torch.cat(right)
    return {
        "predictions/accuracy": (hits & count).sum() / count.sum(),
        "predictions/calibration_error": calibration_error(confidence, hits, count),
    }
