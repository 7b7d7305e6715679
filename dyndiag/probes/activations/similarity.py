"""How similar each block's features are to what they were at the previous sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndiag.probes.activations.blocks import blocks
from dyndiag.probes.activations.features import gram, spread_rows
from dyndiag.probes.activations.hidden import follow
from dyndiag.schedule import FixedInterval, Schedule
from dyndiag.state import Measurements, TrainState

_CALLS = 8
"""Calls of a module from which samples are taken."""


class Similarity:
    """`activations/cka/<block>`: linear CKA of a block's features now and at the last sample.

    CKA(X, Y) = HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)) with linear kernels (Kornblith et al. 2019,
    arXiv 1905.00414) and the unbiased estimate of HSIC (Song et al. 2012): with K = X Xᵀ, L = Y Yᵀ,
    diagonals set to zero, and n samples

    HSIC = [tr(KL) + 1ᵀK1 · 1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3)).

    1 for the same features up to rotation, shift and scale; about 0 ± √2/n for unrelated ones of
    full dimension, where the plain ‖YᵀX‖²/(‖XᵀX‖‖YᵀY‖) is near d/(n + d) for d features. Being an
    estimate it can be a little below 0 or above 1. Eval mode, of up to 256 samples (examples,
    tokens, or places in an image) of the probe batch, always the same. NaN where features do not
    vary or are not finite.

    It falls with the distance between samples, so these are at one fixed interval; where that
    changes, one value is left out. Misleads: a few features of large variance decide it (a single
    massive activation can hold it at 1 while all else changes).

    Cost: one forward of the probe batch, and 256² · features multiply-adds a block: 0.3–0.5 of
    a gradient on a GPT of 1 M parameters (one core). Keeps a matrix of at most 256 × 256 in float32
    a block, 34 MB for 128 blocks. Default: 1 % of training time.
    """

    name = "Similarity"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or FixedInterval(0.01)
        self._before: dict[str, Tensor] = {}
        self._before_step = 0

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        kept = follow(state, blocks(state.model), _kept).blocks
        now = {name: centred_similarities(_rows(calls)) for name, calls in kept.items()}
        distance = state.step - self._before_step
        seen: Measurements = {}
        if distance == getattr(self.due, "interval", distance):
            for name, here in now.items():
                before = self._before.get(name)
                if before is not None and before.shape == here.shape and len(here) > 3:
                    seen[f"activations/cka/{name}"] = (before.to(here) * here).sum()
        self._before, self._before_step = now, state.step
        return seen


def centred_similarities(features: Tensor) -> Tensor:
    """Inner products of samples less their means off the diagonal, of norm 1; (n, n), float32.

    Of two such matrices the sum of the products of their entries is the debiased CKA: with U the
    U-centred Gram matrix (Székely & Rizzo 2014), Σ U_ij V_ij = n(n−3) · HSIC.
    """
    u = gram(features)
    n = len(u)
    u.fill_diagonal_(0)
    if n > 3:
        means = u.sum(dim=0) / (n - 2)
        u = u - means[:, None] - means + means.sum() / (n - 1)
        u.fill_diagonal_(0)
    return (u / torch.linalg.vector_norm(u)).float()


def _kept(rows: Tensor, call: int) -> Tensor | None:
    return spread_rows(rows) if call < _CALLS else None


def _rows(calls: Sequence[Tensor | None]) -> Tensor:
    return spread_rows(torch.cat([rows for rows in calls if rows is not None]))
