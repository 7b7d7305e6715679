"""Entropy and divergence of distributions over classes, a block of rows at a time.

At a vocabulary of 50,000 one array over all positions is larger than any cache (and one of 1,000
positions takes 200 MB), so nothing here holds more than a block besides what is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS_CPU = 2**18
"""In one block: 1 MB, what a core's cache holds."""
_NUMBERS_ACCELERATOR = 2**24
"""Enough to be busy for longer than it takes to launch a block's operations."""


def blocks(scores: Tensor) -> Iterator[slice]:
    """Slices over the rows of (rows, classes)."""
    rows, classes = scores.shape
    numbers = _NUMBERS_CPU if scores.device.type == "cpu" else _NUMBERS_ACCELERATOR
    length = max(1, numbers // classes)
    return (slice(start, start + length) for start in range(0, rows, length))


def entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """−Σ p ln p of rows, (rows, classes) → (rows,), in nats; 0 · ln 0 is 0, and NaN stays NaN.

    >>> p = torch.tensor([[0.5, 0.5, 0.0]])
    >>> round(entropy(p, p.log()).item(), 6)
    0.693147
    """
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)
    return finite.mul_(p).sum(dim=-1).neg_().clamp_min_(0.0)


def jensen_shannon_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD of rows of log-probabilities, (rows, classes) → (rows,), nats, in [0, ln 2].

    H(m) − ½(H(p) + H(q)) with m = ½(p + q). Over u = (q − p)/(q + p) it is
    ¼ Σ (p + q) [(1 + u) ln(1 + u) + (1 − u) ln(1 − u)]: the same number without the difference of
    two entropies, which in float32 buries divergences below 1e-6.

    >>> p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(jensen_shannon_divergence(p, q).item(), 6)
    0.101749
    """
    return divergence(log_p.exp(), log_q.exp())


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The same of rows of probabilities. Overwrites `q`."""
    u = q - p
    both = q.add_(p)
    u /= both.clamp_min(torch.finfo(u.dtype).tiny)
    # At u = ±1 one factor is 0 and its logarithm infinite: the limit of their product is 0.
    u = u.clamp_(-1 + torch.finfo(u.dtype).eps / 2, 1 - torch.finfo(u.dtype).eps / 2)
    terms = u.log1p().mul_(1 + u)
    u.neg_()
    terms += u.log1p().mul_(u.add_(1))
    return both.mul_(terms).sum(dim=-1).mul_(0.25).clamp_min_(0.0)


def log_partition(scores: Tensor) -> Tensor:
    """logsumexp of rows, (rows, classes) → (rows,), float32."""
    parts = [torch.logsumexp(scores[rows].float(), dim=-1) for rows in blocks(scores)]
    return torch.cat(parts) if parts else scores.new_zeros(0, dtype=torch.float32)


@dataclass(frozen=True)
class Distributions:
    """The predictions at some positions, as they are kept to be compared with later ones."""

    scores: Tensor
    """(positions, classes): a copy of the logits, in their own precision (float32 at most)."""
    log_partition: Tensor
    """(positions,), float32."""
    best: Tensor
    """(positions,): the class of the largest score, the first of equal ones."""


@dataclass(frozen=True)
class Positions:
    """What is known of each position's distribution: (positions,) each, float32."""

    entropy: Tensor
    confidence: Tensor
    """The largest probability."""
    jsd: Tensor | None
    """Divergence from the distribution before; None where there is none to compare with."""
    flipped: Tensor | None
    """1 where the class of the largest score is another than before."""


def compare(
    logits: Tensor, before: Distributions | None, comparable: bool = True
) -> tuple[Distributions, Positions]:
    """The distributions of logits (positions, classes), and how they differ from those before.

    `before` is used up: its memory holds the new distributions, where they fit. In float32.
    """
    dtype = logits.dtype if logits.element_size() <= 4 else torch.float32
    fits = (
        before is not None
        and (before.scores.shape, before.scores.dtype) == (logits.shape, dtype)
        and before.scores.device == logits.device
    )
    kept = before.scores if before is not None and fits else torch.empty_like(logits, dtype=dtype)
    old = before if fits and comparable else None
    found: list[tuple[Tensor, ...]] = []
    divergences: list[Tensor] = []
    for rows in blocks(logits):
        scores = logits[rows].float()
        highest, best = scores.max(dim=-1)
        log_z = torch.logsumexp(scores, dim=-1)
        log_p = scores - log_z[:, None]
        p = log_p.exp()
        if old is not None:
            q = (old.scores[rows].float() - old.log_partition[rows, None]).exp_()
            divergences.append(divergence(p, q))
        found.append((entropy(p, log_p), (highest - log_z).exp(), log_z, best))
        kept[rows] = logits[rows]
    entropies, confidence, log_z, best = map(torch.cat, zip(*found, strict=True))
    jsd = None if old is None else torch.cat(divergences)
    flipped = None if old is None else (best != old.best).float()
    return Distributions(kept, log_z, best), Positions(entropies, confidence, jsd, flipped)
