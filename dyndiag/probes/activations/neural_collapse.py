"""How far the features of each class have come together at the last layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.batches import Batch
from dyndiag.probes.activations.features import hidden_of, spread, wide
from dyndiag.probes.predictions.outputs import one_pass
from dyndiag.probes.predictions.targets import targets_of
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState

_MOST_SAMPLES = 4096
_MOST_FEATURES = 512
_NO_DIGITS = str.maketrans("", "", "0123456789")


class NeuralCollapse:
    """`neural_collapse/nc1`, `/vci` and `/vci_of_noise` of the features before the last layer.

    h_i: the inputs of the last `nn.Linear`, the one that gives the class scores, on the probe
    batch in eval mode. With class means μ_k of n_k samples, mean μ, Σ_W = (1/n) Σ (h_i − μ_k)(…)ᵀ,
    Σ_B = Σ_k (n_k/n) (μ_k − μ)(…)ᵀ, Σ_T = Σ_W + Σ_B, † the pseudo-inverse:

    - `nc1` = tr(Σ_W Σ_B†)/K over the K classes there are (Papyan et al. 2020, arXiv 2008.08186;
      there with classes of one size), ≥ 0, 0 at full collapse.
    - `vci` = 1 − tr(Σ_T† Σ_B)/rank Σ_B, the variability collapse index (Xu & Liu 2023,
      arXiv 2306.03440), in [0, 1], 0 at full collapse, the same after any invertible linear map.
    - `vci_of_noise` = 1 − d/(n − 1), d = rank Σ_T: what the vci of features is on average that
      know nothing of the class. Read the vci against it: with few samples it is small by itself.
      nc1 has no such scale; with few samples a class it is too small, too.

    Of more than 4,096 samples as many spread over them count; of more than 512 features as many
    fixed random combinations (their vci is an upper bound of the features'). Left out, and said
    so once: without integer targets of the class scores (see `targets_of`), without a last
    `nn.Linear`; nc1 with less than two samples a class on average; vci with n ≤ d + 1.

    Cost: one forward of the probe batch and the singular values of n × d numbers: 0.4–0.6
    of a gradient on a GPT of 1 M parameters with 1,024 tokens (one core). Default: 1 % of
    training time.
    """

    name = "NeuralCollapse"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=1)
        self.notices: list[str] = []
        self._told: set[str] = set()

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        parts = [_features(state, batch) for batch in state.probe.batches]
        missing = [part for part in parts if isinstance(part, str)]
        if missing:
            if missing[0]:
                self._tell(missing[0])
            return {}
        found = collapse(*(torch.cat(each) for each in zip(*parts, strict=True)))
        seen: Measurements = {}
        if found.classes < 2:
            self._tell("the probe batch holds samples of one class only")
            return seen
        if found.samples < 2 * found.classes:
            self._tell(
                f"the probe batch holds {found.samples} samples of {found.classes} classes, and "
                "nc1 needs two a class at least (pass a larger probe_batch)"
            )
        else:
            seen["neural_collapse/nc1"] = found.nc1
        if found.samples - 1 <= found.rank:
            self._tell(
                f"the probe batch holds {found.samples} samples, whose features fill "
                f"{found.rank} dimensions, and vci needs more samples than dimensions, at best "
                "many times as many (pass a larger probe_batch)"
            )
        else:
            seen["neural_collapse/vci"] = found.vci
            of_noise = math.nan if math.isnan(found.vci) else 1 - found.rank / (found.samples - 1)
            seen["neural_collapse/vci_of_noise"] = of_noise
        return seen

    def _tell(self, why: str) -> None:
        reason = why.translate(_NO_DIGITS)  # the counts of a sentence may change, its point not
        if reason not in self._told:
            self._told.add(reason)
            self.notices.append(why)


@dataclass(frozen=True)
class Collapse:
    """See `NeuralCollapse`; NaN where a feature is not finite."""

    nc1: float
    vci: float
    samples: int
    classes: int
    rank: int
    """Of Σ_T."""


def collapse(features: Tensor, classes: Tensor) -> Collapse:
    """Collapse of (samples, features) with the class of each sample, in float64 on the CPU.

    In the basis of the left singular vectors U of the centred features X = U S Vᵀ no matrix of
    features × features is needed: tr(Σ_T† Σ_B) = Σ_k ‖Uᵀ1_k‖²/n_k for the indicators 1_k of the
    classes, and the class means are those of the rows of U S, but for the rotation V.
    """
    kinds, of = torch.unique(classes.cpu(), return_inverse=True)
    x = features.cpu().double()
    n, k = len(x), len(kinds)
    size, x = torch.linalg.vector_norm(x), x - x.mean(dim=0)
    if not bool(x.isfinite().all()):
        return Collapse(math.nan, math.nan, n, k, 0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    # Features after a norm layer lie in a plane, but for their rounding: that is no dimension.
    eps = torch.finfo(torch.float64 if features.dtype == torch.float64 else torch.float32).eps
    rank = int((s > 8 * eps * size).sum())
    u, s = u[:, :rank], s[:rank]
    sizes = torch.bincount(of, minlength=k).double()[:, None]
    sums = u.new_zeros(k, rank).index_add_(0, of, u)
    _, between, directions = torch.linalg.svd(sums * s / (n * sizes).sqrt(), full_matrices=False)
    rank_between = int((between > 8 * eps * size / math.sqrt(n)).sum())
    if rank_between == 0:
        return Collapse(math.nan, math.nan, n, k, rank)
    within = (u - (sums / sizes)[of]) * s @ directions[:rank_between].T
    nc1 = (within.square().sum(dim=0) / (n * between[:rank_between].square())).sum() / k
    vci = (1 - (sums.square() / sizes).sum() / rank_between).clamp(min=0)
    return Collapse(nc1.item(), vci.item(), n, k, rank)


def _features(state: TrainState, batch: Batch) -> tuple[Tensor, Tensor] | str:
    """Features before the last layer and their classes, in the rows that count, at most
    `_MOST_SAMPLES` of them; or why there are none, nothing if that is for a loss of NaN."""
    with _last_linear(state.model) as calls:
        passed = one_pass(state.model, state.loss_fn, batch)
    if passed.logits is None:
        return "the model's output holds no class scores of shape (…, classes)"
    targets = targets_of(passed)
    if targets is None:
        why = "no targets were found in the probe batch: integers of the class scores' shape"
        return why if passed.loss_tells else ""
    hidden = calls.get(passed.logits.shape[-1])
    rows = None if hidden is None else hidden.detach().flatten(0, -2)
    if rows is None or len(rows) != len(targets.classes):
        return "no torch.nn.Linear gives the class scores, so their features are not known"
    counted = targets.count.nonzero().squeeze(1)
    counted = counted[spread(len(counted), _MOST_SAMPLES).to(counted.device)]
    return _combined(rows[counted.to(rows.device)]), targets.classes[counted]


def _combined(rows: Tensor) -> Tensor:
    if rows.shape[1] <= _MOST_FEATURES:
        return rows
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(rows.shape[1], _MOST_FEATURES, generator=draw)
    combined = wide(rows) @ wide(mix.to(rows.device))
    return combined if rows.dtype == torch.float64 else combined.float()


@contextmanager
def _last_linear(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What went into the last linear layer of each width, by width."""
    inputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = hidden_of(args)
        if hidden is not None and isinstance(module, nn.Linear):
            inputs[module.out_features] = hidden

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(keep) for module in linear]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
