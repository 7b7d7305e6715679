"""Instability of a generation trace, from logits or from the log-probabilities an API returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.language.token_log_probabilities import (
    listed,
    top_log_probabilities,
    whole_vocabulary,
)

_PREFIXES = (16, 32, 64)
_HALF_LN2 = 0.5 * math.log(2)
_NOTHING = 1e-9
"""Less probability than this outside the list is rounding."""


@dataclass(frozen=True, eq=False)
class TraceInstability:
    """Instability of one generated sequence over its decoding steps t = 2 … T.

    Arrays have T − 1 entries: entry i belongs to step t = i + 2, the first that has one before
    it. Nats. That a signal from the Jensen–Shannon divergence of consecutive steps and the
    entropy, summarised by its peak, tells wrong answers from right ones, and that late peaks are
    worse than early ones, is from arXiv 2602.02863; the weight, k, the lengths of prefixes and
    the cut between early and late are ours.
    """

    instability: np.ndarray
    """I_t = JSD(p̃_{t−1}, p̃_t) + weight · H(p̃_t), p̃ the k likeliest tokens, renormalised."""
    jsd: np.ndarray
    entropy: np.ndarray
    """H(p̃_t), without the weight."""
    lower_bound: np.ndarray
    """The instability of the whole distributions is at least this, by what the data hold."""
    upper_bound: np.ndarray
    """… and at most this; infinite where the vocabulary's size is needed and not known."""
    steps: int
    """T, the number of distributions."""

    @property
    def strength(self) -> float:
        """max I_t; NaN without two steps."""
        return float(self.instability.max()) if len(self.instability) else math.nan

    @property
    def peak_step(self) -> int | None:
        """t of the peak, counted from 1; the first of equal ones; None without two steps."""
        return int(self.instability.argmax()) + 2 if len(self.instability) else None

    @property
    def peak_parts(self) -> tuple[float, float]:
        """JSD and entropy at the peak: a confident trace has its JSD near ln 2 throughout."""
        if self.peak_step is None:
            return math.nan, math.nan
        return float(self.jsd[self.peak_step - 2]), float(self.entropy[self.peak_step - 2])

    @property
    def position(self) -> float:
        """ρ = (t* − 2)/(T − 2) of the peak t*, in [0, 1]; NaN for fewer than three steps."""
        if self.peak_step is None or self.steps < 3:
            return math.nan
        return (self.peak_step - 2) / (self.steps - 2)

    @property
    def timing(self) -> str:
        """`early` (ρ ≤ ½: a candidate for a correction) or `late` (ρ > ½: for a breakdown).

        The cut is ours. Empty for fewer than three steps.
        """
        return "" if math.isnan(self.position) else "late" if self.position > 0.5 else "early"

    @property
    def prefix_strength(self) -> dict[int, float]:
        """max over t ≤ w of I_t for w = 16, 32, 64, as far as the trace is that long.

        Longer traces have higher maxima by chance: compare traces at equal prefixes.
        """
        return {w: float(self.instability[: w - 1].max()) for w in _PREFIXES if w <= self.steps}


def trace_instability(
    logits_or_log_probabilities: Any,
    k: int = 20,
    weight: float = 1.0,
    vocabulary: int | None = None,
) -> TraceInstability:
    """Instability strength of one generated sequence.

    Parameters
    ----------
    logits_or_log_probabilities
        Of each decoding step: logits or log-probabilities over the whole vocabulary, (steps,
        vocabulary); or what APIs return, a sequence with one entry a step, each either
        `{token: log-probability}` or `(tokens, log-probabilities)`, of the likeliest tokens (or
        one pair of arrays, (steps, k) each).
    k
        Of how many tokens a step's distribution is made.
    weight
        Of the entropy against the divergence.
    vocabulary
        The vocabulary's size, for the upper bound, where log-probabilities of a few are given.

    Between positions even a confident model changes its mind at every step, so look at the two
    parts of the peak. The distributions should be the model's own, at temperature 1; at another
    one all values are of that. Raises DyndiagError for what cannot be read.

    >>> steps = [{"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}, {"a": 0.99, "b": 0.01}]
    >>> logs = [{token: math.log(p) for token, p in step.items()} for step in steps]
    >>> trace = trace_instability(logs)
    >>> round(trace.strength, 6), trace.peak_step, trace.timing
    (0.794896, 2, 'early')
    """
    check_settings(k, weight)
    whole = whole_vocabulary(logits_or_log_probabilities)
    if whole is None:
        tokens, log_p = listed(logits_or_log_probabilities, k)
        return instability_of(tokens, log_p, weight, vocabulary)
    tokens, log_p = top_log_probabilities(whole, k)
    return instability_of(tokens, log_p, weight, whole.shape[1])


def check_settings(k: int, weight: float) -> None:
    """Raises DyndiagError for what is no number of tokens and no weight."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise DyndiagError(f"k must be a number of tokens, 1 or more, but it is {k!r}")
    if not 0 <= weight < math.inf:
        raise DyndiagError(f"weight must be a finite number, 0 or more, but it is {weight!r}")


def instability_of(
    tokens: Tensor, log_p: Tensor, weight: float, vocabulary: int | None
) -> TraceInstability:
    """From the likeliest tokens of each step and their log-probabilities, (steps, k) each.

    Where a step lists fewer, log-probability −∞ and a negative token stand for the others.

    Bounds. Divergence: lump all that is not in both steps' lists into one rest; that can only
    lower it, and with the two rests disjoint it is as high as it can be. Entropy: with the rest r
    outside the list lumped it is too low by at most r · ln(vocabulary − k).
    """
    tokens, p = tokens.detach().cpu(), log_p.detach().cpu().double().exp()
    top = p / p.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(top).sum(dim=1)[1:]
    here, after = _found_in_next(tokens)
    q = top[1:].gather(1, after).where(here, 0.0)
    jsd = _terms(top[:-1], q).sum(dim=1) + _HALF_LN2 * (1 - q.sum(dim=1)).clamp_min(0.0)
    jsd = jsd.clamp(0.0, math.log(2))

    both = p[:-1].where(here, 0.0), p[1:].gather(1, after).where(here, 0.0)
    rests = [(1 - part.sum(dim=1)).clamp_min(0.0) for part in both]
    common = _terms(*both).sum(dim=1)
    jsd_least = common + _terms(*rests)
    jsd_most = (common + _HALF_LN2 * (rests[0] + rests[1])).clamp_max(math.log(2))
    rest = 1 - p.sum(dim=1)
    rest = rest.where(~(rest < _NOTHING), 0.0)[1:]  # NaN stays
    entropy_least = torch.special.entr(p).sum(dim=1)[1:] + torch.special.entr(rest)
    if vocabulary is None:
        spread = torch.full_like(rest, math.inf)
    else:
        spread = (vocabulary - (tokens[1:] >= 0).sum(dim=1)).clamp_min(1).double().log()
    entropy_most = entropy_least + (rest * spread).where(rest != 0, 0.0)
    if vocabulary is not None:
        entropy_most = entropy_most.clamp_max(math.log(vocabulary))
    return TraceInstability(
        instability=(jsd + weight * entropy).numpy(),
        jsd=jsd.numpy(),
        entropy=entropy.numpy(),
        lower_bound=(jsd_least + weight * entropy_least).numpy(),
        upper_bound=(jsd_most + (weight * entropy_most if weight else 0.0)).numpy(),
        steps=len(tokens),
    )


def _terms(p: Tensor, q: Tensor) -> Tensor:
    """½ [p ln(p/m) + q ln(q/m)] with m = ½(p + q), of each token."""
    m = (0.5 * (p + q)).clamp_min(torch.finfo(p.dtype).tiny)
    return 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m))


def _found_in_next(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token of steps 1 … T − 1: whether the next step lists it, and where."""
    following, order = tokens[1:].sort(dim=1)
    earlier = tokens[:-1].contiguous()
    at = torch.searchsorted(following, earlier).clamp_max(max(0, tokens.shape[1] - 1))
    here = (following.gather(1, at) == earlier) & (earlier >= 0)
    return here, order.gather(1, at)
