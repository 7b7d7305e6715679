"""How the loss is spread over examples, and which examples training moves against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.example_losses import chosen_examples, example_losses
from dyndiag.schedule import Budget, FixedInterval, Schedule
from dyndiag.state import Measurements, TrainState

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_LOW_LOSS = 0.01
_TAIL = 100
"""One example in so many is in a group."""


class LossQuantiles:
    """`predictions/loss_quantile/05`, `/25`, `/50`, `/75`, `/95` and `predictions/low_loss_share`.

    Quantiles (linear between order statistics) of the loss of single examples of the probe batch,
    eval mode, in the loss's unit; and the share of examples with a loss below .01, in [0, 1]:
    those that hardly pull any more (gradient starvation, Pezeshki et al. 2021, arXiv 2011.09468;
    the level is ours). An example is one row of the batch: of a language model a sequence, with
    its mean over tokens.

    Cost: one forward of the probe batch; where its loss is not a plain mean of cross-entropy, as
    many forwards of one example besides. Default: at most 1 % of training time. Misleads where
    the loss couples examples (contrastive losses): then an example alone has another loss.
    """

    name = "LossQuantiles"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=0.4)
        self.notices: list[str] = []

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    def measure(self, state: TrainState) -> Measurements:
        found = _losses_or_notice(state, self.name, self.notices)
        if found is None or not bool(found[1].any()):
            return {}
        known = found[0][found[1]]
        levels = torch.tensor(_QUANTILES, dtype=torch.float64, device=known.device)
        names = tuple(f"predictions/loss_quantile/{100 * level:02.0f}" for level in _QUANTILES)
        return {
            names: torch.quantile(known.double(), levels),
            "predictions/low_loss_share": (known < _LOW_LOSS).double().mean(),
        }


class OpposingSignals:
    """Examples whose losses moved most in opposite directions since the last sample.

    Of the change of each example's loss (eval mode), the most positive and the most negative 1 %
    of examples (at least one each): `predictions/opposing_rise` and `predictions/opposing_fall`,
    the groups' mean changes; `predictions/opposing_cosine`, the cosine of the two groups' mean
    gradients now, in [−1, 1]; and the arrays `predictions/opposing_rising_examples` and
    `predictions/opposing_falling_examples`: their numbers in the probe batch, most moved first.
    Rosenfeld & Risteski 2023, arXiv 2311.04163: outlier groups with large opposing gradients,
    between which training at the edge of stability oscillates. Signs of it: rise > 0 > fall, both
    large beside the median change, and a cosine near −1.

    Cost: one forward of the probe batch (see `LossQuantiles`), and forward and backward of the
    two groups alone; keeps one number an example. Default: a fixed odd interval, at most 1 % of
    training time. Misleads: with a falling loss "rise" may be a fall, only the least; 1 % of a
    small probe batch is one example; changes over unequal intervals do not compare. It does not
    say whether the groups lie along the sharpest direction.
    """

    name = "OpposingSignals"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or FixedInterval(0.01)
        self.notices: list[str] = []
        self._before: Tensor | None = None

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    def measure(self, state: TrainState) -> Measurements:
        before, self._before = self._before, None
        found = _losses_or_notice(state, self.name, self.notices)
        if found is None:
            return {}
        losses, has_one = found
        self._before = losses
        if before is None or before.shape != losses.shape:
            return {}
        change = losses.double() - before.to(losses.device).double()
        known = (has_one & ~change.isnan()).nonzero().squeeze(1)
        if len(known) < 2:
            return {}
        order = known[change[known].argsort(descending=True, stable=True)]
        size = max(1, len(order) // _TAIL)
        rising, falling = order[:size], order[-size:].flip(0)
        seen: Measurements = {
            "predictions/opposing_rise": change[rising].mean(),
            "predictions/opposing_fall": change[falling].mean(),
            "predictions/opposing_rising_examples": rising,
            "predictions/opposing_falling_examples": falling,
        }
        cosine = _cosine(_gradient(state, rising), _gradient(state, falling))
        return seen if cosine is None else seen | {"predictions/opposing_cosine": cosine}


def _losses_or_notice(
    state: TrainState, name: str, notices: list[str]
) -> tuple[Tensor, Tensor] | None:
    state.model.eval()
    try:
        found = example_losses(state)
    except DyndiagError as error:
        notices.append(f"{name} needs the loss of single examples, and there is none: {error}")
        return None
    if found is None:
        notices.append(
            f"{name} needs the loss of single examples: pass loss_fn(model, batch), or a probe "
            "batch with integer targets of the logits' shape"
        )
    return found


def _gradient(state: TrainState, indices: Tensor) -> list[Tensor | None]:
    """Mean gradient of these examples' losses; Nones without a loss function."""
    if state.loss_fn is None:
        return [None for _ in state.parameters]
    with torch.enable_grad():
        parts = [state.loss_fn(state.model, one) for one in chosen_examples(state, indices)]
        loss = torch.stack([part.reshape(()) for part in parts]).mean()
        found = torch.autograd.grad(loss, state.parameters, allow_unused=True)
    return [None if g is None else _real(g) for g in found]


def _real(gradient: Tensor) -> Tensor:
    """Dense, and a complex one as pairs of real numbers."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(dense) if dense.is_complex() else dense


def _cosine(one: list[Tensor | None], other: list[Tensor | None]) -> Tensor | None:
    """Over all parameters, 0-d; None where one of them is nothing."""
    squares = _squares(one), _squares(other)
    if not all(bool(square > 0) for square in squares):
        return None
    inner = torch.zeros_like(squares[0])
    for g, h in zip(one, other, strict=True):
        if g is not None and h is not None:
            inner += (g.double() * h.double()).sum()
    return inner / (squares[0] * squares[1]).sqrt()


def _squares(gradient: list[Tensor | None]) -> Tensor:
    found = [g.double().square().sum() for g in gradient if g is not None]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)
