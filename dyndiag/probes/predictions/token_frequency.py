"""The loss of frequent and of rare tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.outputs import passes
from dyndiag.probes.predictions.targets import targets_of
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState

_BUCKETS = 10


class TokenFrequency:
    """`predictions/loss_by_frequency/01` (most frequent tokens) … `/10` (rarest).

    Mean cross-entropy, in nats, over the target tokens of each frequency decile: the vocabulary in
    order of frequency, cut so that each bucket holds a tenth of all tokens counted (a token by the
    middle of its share; a bucket that no token falls into is left out). After Kunstner et al.
    2024, arXiv 2402.19449, where the loss of rare classes hardly falls under gradient descent.

    Frequencies are those of the probe batch's own targets, counted at the first sample, so that
    the buckets stay what they are; or `counts`, (vocabulary,), the tokens' counts in the training
    data, which is better: in a small probe batch many tokens come once that are not rare.

    Cost: one forward of the probe batch. Default: at most 1 % of training time. Misleads: the
    rarest bucket of the probe batch's own counts holds those that came once, by chance, too.
    """

    name = "TokenFrequency"

    def __init__(self, due: Schedule | None = None, counts: Tensor | None = None) -> None:
        if counts is not None and (counts.dim() != 1 or not bool(counts.sum() > 0)):
            raise DyndiagError(
                "counts must be how often each token comes in the training data, of shape "
                f"(vocabulary,) and not all 0, but it has shape {tuple(counts.shape)} and sum "
                f"{float(counts.sum()):g}: pass a torch.bincount of the tokens"
            )
        self.due = due or Budget(0.01, gradients=0.4)
        self.notices: list[str] = []
        self._counts = None if counts is None else counts.detach().clone()
        self._bucket: Tensor | None = None
        """(vocabulary,): of each token."""

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        losses: list[Tensor] = []
        tokens: list[Tensor] = []
        vocabulary = 0
        tells = True
        for passed in passes(state.model, state.loss_fn, state.probe):
            tells &= passed.loss_tells
            targets = targets_of(passed)
            if targets is not None:
                losses.append(targets.losses[targets.count])
                tokens.append(targets.classes[targets.count])
                vocabulary = max(vocabulary, passed.scores.shape[1])
        if len(tokens) < len(state.probe.batches):
            if tells:
                self.notices.append(
                    "TokenFrequency found no target tokens in the probe batch: they must be an "
                    "integer tensor that fits the logits, whose cross-entropy is the loss"
                )
            return {}
        loss, token = torch.cat(losses).double(), torch.cat(tokens)
        if self._bucket is None or len(self._bucket) != vocabulary:
            own = torch.bincount(token, minlength=vocabulary)
            self._bucket = frequency_deciles(
                own if self._counts is None else self._counts, vocabulary
            )
        bucket = self._bucket.to(token.device)[token]
        seen: Measurements = {}
        for b in range(_BUCKETS):
            inside = bucket == b
            if bool(inside.any()):
                seen[f"predictions/loss_by_frequency/{b + 1:02}"] = loss[inside].mean()
        return seen


def frequency_deciles(counts: Tensor, vocabulary: int) -> Tensor:
    """The decile, 0 for the most frequent, of each token, (vocabulary,), by share of all counts.

    >>> frequency_deciles(torch.tensor([0, 5, 50, 45]), 4).tolist()
    [9, 9, 2, 7]
    """
    padded = torch.zeros(vocabulary, dtype=torch.float64, device=counts.device)
    padded[: len(counts)] = counts[:vocabulary].double()
    order = padded.argsort(descending=True, stable=True)
    share = padded[order] / padded.sum()
    middle = share.cumsum(0) - share / 2
    deciles = torch.empty(vocabulary, dtype=torch.int64, device=counts.device)
    # A hair less, so that a middle on an edge is not decided by rounding.
    deciles[order] = (middle * _BUCKETS - 1e-9).floor().long().clamp(0, _BUCKETS - 1)
    return deciles
