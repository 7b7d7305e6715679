"""Maxima and entropies of attention scores, a block of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dyndiag.probes.logits.attention_scores import Scores

_BLOCK = 2**17
"""Half a megabyte in float32, which stays in a core's cache."""
_ACCELERATOR_BLOCK = 2**22
"""There, launches are what costs."""
_CAUSAL_QUERIES = 256
"""Queries at a time under a causal mask, so that later keys are left out."""
_NOTHING = {torch.float32: -87.0, torch.float64: -700.0}
"""Stands for −∞ in exponentials: what they add vanishes beside the maximum's 1, times itself too
(where −∞ would make NaN), and further down they take thirty times as long."""


@dataclass
class HeadStatistics:
    """Of one module and step: each head's largest logit, summed row entropies, and rows."""

    highest: Tensor
    entropy: Tensor
    rows: Tensor
    told_apart: bool = True

    def and_also(self, other: HeadStatistics) -> HeadStatistics:
        if len(self.highest) != len(other.highest):  # not the same heads
            return self._together().and_also(other._together())
        return HeadStatistics(
            torch.maximum(self.highest, other.highest),
            self.entropy + other.entropy,
            self.rows + other.rows,
            self.told_apart and other.told_apart,
        )

    def _together(self) -> HeadStatistics:
        sums = self.entropy.sum(0, keepdim=True), self.rows.sum(0, keepdim=True)
        return HeadStatistics(self.highest.amax(0, keepdim=True), *sums, told_apart=False)

    def series(self) -> dict[str, Tensor]:
        found = {
            "logit_max": self.highest.amax(),
            "entropy": self.entropy.sum() / self.rows.sum(),
        }
        if self.told_apart:
            found |= {"head_logit_max": self.highest, "head_entropy": self.entropy / self.rows}
        return found


def block_size(device: torch.device) -> int:
    """Scores held at a time."""
    return _BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK


def maxima(scores: Scores, of: int, block: int | None = None) -> Tensor:
    """Largest unmasked score, signed, of each head of the first `of` sequences, (…, heads).

    −inf (or below `scores.lowest`) where all is masked. Cost: their products; one block held.
    """
    size = block or block_size(scores.device)
    if of * scores.heads * scores.queries * scores.keys <= size:
        whole = slice(0, of), slice(0, scores.queries), slice(0, scores.keys)
        return scores.block(*whole).amax(dim=(-2, -1)).flatten(0, -2)
    found: list[Tensor] = []
    for first_rows, tiles in _rows(scores, of, size):
        top = reduce(torch.maximum, (z.amax(dim=(-2, -1)) for z in tiles))
        if first_rows:
            found.append(top)
        else:
            found[-1] = torch.maximum(found[-1], top)
    together = found[0] if len(found) == 1 else torch.cat(found)
    return together.flatten(0, -2)


def entropies(scores: Scores, of: int, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Of each head over the first `of` sequences: the sum of its rows' entropies, and how many
    rows these are; (heads,) float64 both, in nats.

    A row with weights p over its unmasked keys has −Σ p ln p, from 0 to ln(number of keys); rows
    without any are left out. Kept for each row over the tiles of keys: the maximum m,
    l = Σ e^(z−m) and a = Σ e^(z−m)·(z−m), which become l·s and s·(a + l·(m−m′)) with s = e^(m−m′)
    where the maximum rises to m′; the entropy is ln l − a/l. Relative to m, a does not cancel
    where scores are large.
    """
    sums, counts = [], []
    for _, tiles in _rows(scores, of, block or block_size(scores.device)):
        rows = _Rows.of(next(tiles))
        for z in tiles:
            rows = rows.and_also(z)
        visible = ~(rows.highest <= scores.lowest)  # NaN is visible
        entropy = (rows.total.log() - rows.weighted / rows.total).where(visible, 0.0)
        sums.append(_by_head(entropy))
        counts.append(_by_head(visible))
    return torch.stack(sums).sum(0), torch.stack(counts).sum(0)


def _by_head(rows: Tensor) -> Tensor:
    """Sum over all but the heads, of (…, heads, queries)."""
    return rows.sum(dim=-1, dtype=torch.float64).flatten(0, -2).sum(dim=0)


class _Rows:
    """What is kept of each row of scores: its maximum, l and a."""

    def __init__(self, highest: Tensor, total: Tensor, weighted: Tensor) -> None:
        self.highest, self.total, self.weighted = highest, total, weighted

    @classmethod
    def of(cls, z: Tensor, highest: Tensor | None = None) -> _Rows:
        top = z.amax(dim=-1) if highest is None else highest
        below = (z - _finite(top).unsqueeze(-1)).clamp_min_(_NOTHING[z.dtype])
        weights = below.exp()
        return cls(top, weights.sum(dim=-1), below.mul_(weights).sum(dim=-1))

    def and_also(self, z: Tensor) -> _Rows:
        top = torch.maximum(self.highest, z.amax(dim=-1))
        new = _Rows.of(z, top)
        fall = (self.highest - _finite(top)).clamp_min_(_NOTHING[z.dtype])
        shrink = fall.exp()
        return _Rows(
            top,
            new.total + shrink * self.total,
            new.weighted + shrink * (self.weighted + self.total * fall),
        )


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == -torch.inf, 0.0)  # nothing is visible as yet


def _rows(scores: Scores, of: int, size: int) -> Iterator[tuple[bool, Iterator[Tensor]]]:
    """Some rows of scores of some sequences, in tiles along the keys, one block at most each; with
    whether they are the first of these sequences."""
    keys = min(scores.keys, max(1, size // scores.heads))
    queries = min(scores.queries, max(1, size // (scores.heads * keys)))
    if scores.causal:
        queries = min(queries, _CAUSAL_QUERIES)
    at_once = max(1, size // (scores.heads * queries * keys))
    for sequences in _parts(of, at_once):
        for some in _parts(scores.queries, queries):
            last = min(scores.keys, some.stop) if scores.causal else scores.keys
            parts = _parts(last, keys)
            yield some.start == 0, (scores.block(sequences, some, part) for part in parts)


def _parts(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(total, first + size))
