"""Which classes are learnt, and which of them the gradient is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.probes.modules import MOST_PARTS
from dyndiag.probes.predictions.outputs import Pass, one_pass
from dyndiag.probes.predictions.targets import Targets, targets_of
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState

_LOW_LOSS = 0.01


class ClassImbalance:
    """`predictions/loss_by_class/<c>` and `predictions/gradient_share_by_class/<c>`.

    Mean cross-entropy over the probe batch's targets of class c, in nats; and ‖g_c‖²/‖g‖², with
    g_c the gradient of that part of the loss which comes from them (g = Σ g_c), eval mode, ≥ 0.
    Shares need not sum to 1: what is missing or too much are the cross terms 2 g_cᵀg_d, negative
    where classes pull against each other. `predictions/low_loss_gradient_share`: the same share
    of the targets with a loss below .01, which hardly pull any more (gradient starvation,
    Pezeshki et al. 2021, arXiv 2011.09468; the level is ours). Under gradient descent rare
    classes lag: Kunstner et al. 2024, arXiv 2402.19449.

    With more than 128 classes the losses are one array, `predictions/loss_by_class` (NaN for a
    class without a target), and there are no shares: see `TokenFrequency`.

    Cost: one forward of the probe batch and a backward for each class in it. Default: at most 1 %
    of training time. Misleads: shares are of the cross-entropy's gradient, and left out where
    that is not the loss (label smoothing, weights, penalties); few examples make noisy shares.
    """

    name = "ClassImbalance"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=10)
        self.notices: list[str] = []

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    def measure(self, state: TrainState) -> Measurements:
        assert state.probe is not None
        state.model.eval()
        found: list[tuple[Pass, Targets]] = []
        with torch.enable_grad():
            for batch in state.probe.batches:
                passed = one_pass(state.model, state.loss_fn, batch, graph=True)
                targets = targets_of(passed)
                if targets is None:
                    if passed.loss_tells:
                        self.notices.append(
                            "ClassImbalance found no targets in the probe batch: they must be an "
                            "integer tensor that fits the logits, whose cross-entropy is the loss"
                        )
                    return {}
                found.append((passed, targets))
            count = max(passed.scores.shape[1] for passed, _ in found)
            loss = torch.cat([t.losses[t.count] for _, t in found]).double()
            of_class = torch.cat([t.classes[t.count] for _, t in found])
            if count > MOST_PARTS:
                return {"predictions/loss_by_class": _means(loss, of_class, count)}
            present = of_class.unique().tolist()
            seen: Measurements = {
                f"predictions/loss_by_class/{c}": loss[of_class == c].mean() for c in present
            }
            if not all(targets.verified for _, targets in found):
                if all(passed.loss_tells for passed, _ in found):
                    self.notices.append(
                        "ClassImbalance leaves out the shares of the gradient: the loss is not the "
                        "mean cross-entropy of the batch's targets"
                    )
                return seen
            return seen | _shares(state, found, present)


def _means(loss: Tensor, of_class: Tensor, count: int) -> Tensor:
    total = loss.new_zeros(count).index_add_(0, of_class, loss)
    return total / torch.bincount(of_class, minlength=count)


def _shares(
    state: TrainState, found: list[tuple[Pass, Targets]], classes: list[int]
) -> Measurements:
    assert state.probe is not None
    parts: list[tuple[Tensor, Targets]] = []
    for (passed, targets), weight in zip(found, state.probe.weights, strict=True):
        each = torch.nn.functional.cross_entropy(
            passed.scores.float(), targets.classes, reduction="none"
        )
        parts.append((weight * each / targets.count.sum(), targets))

    def gradient(chosen: list[Tensor]) -> list[Tensor | None]:
        of = [each[rows].sum() for (each, _), rows in zip(parts, chosen, strict=True)]
        found = torch.autograd.grad(
            torch.stack(of).sum(), state.parameters, retain_graph=True, allow_unused=True
        )
        return [g.to_dense() if g is not None and g.is_sparse else g for g in found]

    whole = _squared_norm(gradient([t.count for _, t in parts]))
    chosen = {
        f"predictions/gradient_share_by_class/{c}": [t.count & (t.classes == c) for _, t in parts]
        for c in classes
    }
    chosen["predictions/low_loss_gradient_share"] = [
        t.count & (t.losses < _LOW_LOSS) for _, t in parts
    ]
    return {name: _squared_norm(gradient(rows)) / whole for name, rows in chosen.items()}


def _squared_norm(gradient: list[Tensor | None]) -> Tensor:
    found = [torch.view_as_real(g) if g.is_complex() else g for g in gradient if g is not None]
    found = [g.double().square().sum() for g in found]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)
