"""Curvature of the probe batch's loss, and where it stands against the optimizer's threshold."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, stdev

import torch

from dyndiag.batches import same_data
from dyndiag.curvature import (
    Operator,
    batch_sharpness,
    spectral_density,
    trace,
)
from dyndiag.curvature.follow import Followed, Follower
from dyndiag.optimizers import (
    Unknown,
    edge_operator,
    frobenius_ratio,
    plain_sgd_rate,
    preconditioned_operator,
    read_rule,
    trace_ratio,
)
from dyndiag.probes.checked_hessian import CheckedHessian
from dyndiag.probes.edge_watch import EdgeWatch
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_TOLERANCE = 1e-2
"""Residual over value; with the certificate's 1 % that is what a threshold can be judged by."""
_PLAIN, _PRECONDITIONED = _SHARPNESS = ("curvature/sharpness", "curvature/preconditioned_sharpness")
_TWICE = "twice the edge ratio"
_STANDARD_ERROR = 0.05
"""Of a value, at which an estimate by samples counts as converged."""
_BATCHES, _FEWEST_BATCHES = 32, 10
"""Batches that the mean of batch sharpness is over, and from how many it may be converged."""


def can_measure_loss(state: TrainState) -> bool:
    """Whether there is a loss of the probe batch, and a parameter to differentiate it by."""
    return bool(state.parameters) and state.loss_fn is not None and state.probe is not None


class Sharpness:
    """`curvature/sharpness` and, where the update rule is known, `stability/edge_ratio`.

    Sharpness is λ₁ of the probe batch's Hessian, eval mode, over the trainable parameters, followed
    from sample to sample. From the live optimizer, at this step's rate and with this step's
    gradient in its state: `curvature/preconditioned_sharpness` (where its preconditioner is not 1),
    `stability/threshold` (where one number is), `stability/edge_ratio` (χ; 1 is the edge of
    stability), `stability/warmup` (1 while a frozen preconditioner does not describe the optimizer
    yet), `stability/full_batch` (1 if the step was taken on the probe batch itself).

    Most samples are provisional. With residual and certificate come those that `Follower` starts
    anew (the first, every tenth, one that has risen by a fifth), and every edge ratio that may
    open, top or close an edge event.

    Cost: one forward and backward, and for each eigenproblem 3–14 Hessian-vector products, 4–20
    more where certified: one for plain SGD, one more with a preconditioner, one more where groups
    or decays differ.
    """

    name = "Sharpness"

    def __init__(self, due: Schedule, hessian: CheckedHessian | None = None) -> None:
        self.due = due
        self._hessian = hessian or CheckedHessian()
        self.notices = self._hessian.notices
        self.applies = can_measure_loss
        generator = torch.Generator().manual_seed(0)
        self._followers = {name: Follower(generator, _TOLERANCE) for name in (*_SHARPNESS, _TWICE)}
        self._certified_at: dict[str, int] = {}
        self._watch = EdgeWatch()

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        rule = read_rule(state.optimizer, state.parameters, state.learning_rates)
        if isinstance(rule, Unknown):
            self.notices.append(f"no threshold and no edge ratio: {rule.reason}")
            return {_PLAIN: self._largest(_PLAIN, hessian, state.step)}
        problems: dict[str, Operator] = {_PLAIN: hessian}
        if rule.preconditioned:
            problems[_PRECONDITIONED] = preconditioned_operator(hessian, rule)
        line, threshold = rule.edge_ratio_line(), rule.threshold()
        if line is None:  # groups or decays differ: an eigenproblem of its own
            problems[_TWICE] = edge_operator(hessian, rule)
        judged = list(problems)[-1]
        slope, offset = line or (0.5, 0.0)

        def decides(value: float) -> bool:
            """Of a warm-up, and of what is not finite, no edge ratio is judged."""
            ratio = slope * value + offset
            return not rule.warmup and math.isfinite(ratio) and self._watch.decides(ratio)

        found = {
            name: self._largest(name, problem, state.step, decides if name == judged else False)
            for name, problem in problems.items()
        }
        ratio = _mapped(found[judged], slope, offset)
        if line is not None:
            ratio = replace(ratio, products=0)  # paid by the sharpness
        judges = not rule.warmup and math.isfinite(ratio.value)
        if judges and (ratio.converged or ratio.provisional):
            self._watch.take(ratio.value, certified=ratio.converged)

        seen: Measurements = {name: found[name] for name in _SHARPNESS if name in found}
        if threshold is not None:
            seen["stability/threshold"] = threshold
        seen["stability/edge_ratio"] = ratio
        seen["stability/warmup"] = float(rule.warmup)
        seen["stability/full_batch"] = float(same_data(state.batch, state.probe))
        return seen

    def _largest(
        self,
        name: str,
        operator: Operator,
        step: int,
        certify: bool | Callable[[float], bool] = False,
    ) -> Estimate:
        found = self._followers[name].largest(operator, certify=certify)
        if found.missed:
            since = self._certified_at.get(name, step)
            self.notices.append(
                f"the certificate at step {step} found a larger {_words(name)} than the sample "
                f"before it led to: provisional values since step {since} may have missed it"
            )
        if found.converged:
            self._certified_at[name] = step
        return _estimate(found)


def _words(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _estimate(found: Followed) -> Estimate:
    return Estimate(
        value=found.value,
        error=found.error_bound,
        products=found.products,
        converged=found.converged,
        provisional=found.provisional,
        upper_bound=found.upper_bound,
    )


def _mapped(estimate: Estimate, slope: float, offset: float) -> Estimate:
    upper = estimate.upper_bound
    return replace(
        estimate,
        value=slope * estimate.value + offset,
        error=slope * estimate.error,
        upper_bound=None if upper is None else slope * upper + offset,
    )


class BatchSharpness:
    """`curvature/batch_sharpness`: gᵀHg / gᵀg on the step's own batch, eval mode.

    One batch at a time, of the batch sharpness BS = E_B[g_BᵀH_Bg_B / ‖g_B‖²] of Andreyev &
    Beneventano (2024, arXiv 2412.20553): loss per squared parameter, any sign, NaN where the
    gradient is zero. For plain SGD (no momentum, no decay), else absent,
    `stability/batch_sharpness_ratio` = ½η · the mean over the last 32 batches sampled, with its
    standard error, taking them as independent; converged from ten batches on, where that is at
    most 5 %. The batches were met at different weights, so drift is in the error as well.

    The claim is that plain SGD comes to hover at a ratio of 1. It is a signal without a pass mark:
    on a 64-32-32-10 tanh classifier of 500 digits at η = 0.3 it ended at .68 with batches of 8, at
    .78 with 32 and at 1.00 with all, and on a parameter of random curvature 1 or 3 it is 1 at
    η = 1, where single runs still shrink (up to η = 4/3) though their mean square has grown since
    η = 0.8.

    Cost: one gradient and one product.
    """

    name = "BatchSharpness"

    def __init__(self, due: Schedule, hessian: CheckedHessian | None = None) -> None:
        self.due = due
        self._hessian = hessian or CheckedHessian()
        self.notices = self._hessian.notices
        self._lately: deque[float] = deque(maxlen=_BATCHES)

    def applies(self, state: TrainState) -> bool:
        return can_measure_loss(state) and state.batch is not None

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        value = batch_sharpness(self._hessian.of_batch(state))
        seen: Measurements = {"curvature/batch_sharpness": value}
        rate = _plain_sgd_rate(state)
        if rate is None:
            return seen
        if math.isfinite(latest := float(value)):  # a zero gradient has no direction
            self._lately.append(latest)
        count = len(self._lately)
        if count == 0:
            return seen
        error = stdev(self._lately) / math.sqrt(count) if count > 1 else math.nan
        level = fmean(self._lately)
        seen["stability/batch_sharpness_ratio"] = Estimate(
            value=0.5 * rate * level,
            error=0.5 * rate * error,
            converged=count >= _FEWEST_BATCHES and error <= _STANDARD_ERROR * abs(level),
        )
        return seen


class Trace:
    """`curvature/trace` and `curvature/frobenius_norm` of the probe batch's Hessian, eval mode.

    By Hutchinson's estimator: tr H the mean of zᵀHz, ‖H‖_F the root of the mean of ‖Hz‖² over the
    same random z of ±1. `.error` is the standard error, and converged says that it is at most 5 %.
    tr H: loss per squared parameter, any sign; unbiased for the whole training loss, which a small
    probe batch's ‖H‖_F is not (it is too large). The root makes ‖H‖_F too small by about
    error²/(2 · value).

    For plain SGD (no momentum, no decay), else absent, how far two rules of mean-square stability
    are, B being the number of examples in the step's batch on this process:
    `stability/trace_ratio` = η tr H / (2B) and `stability/frobenius_ratio` = η ‖H‖_F / √B, the
    latter for gradient noise aligned with the curvature by μ = 1, which proves nothing of other
    noise. Both are necessary conditions at a minimum that interpolates, with per-example Hessians
    of rank 1 (one output; with C outputs compare the trace ratio with C): above 1 unstable in mean
    square, below 1 nothing is promised. See `dyndiag.optimizers.minibatch`. Away from a minimum, or
    where one run is watched, they are numbers to look at, and no event opens from them.

    Cost: one gradient and ten products.
    """

    name = "Trace"

    def __init__(self, due: Schedule, hessian: CheckedHessian | None = None) -> None:
        self.due = due
        self._hessian = hessian or CheckedHessian()
        self.notices = self._hessian.notices
        self.applies = can_measure_loss
        self._generator = torch.Generator().manual_seed(1)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        found = trace(hessian, max_products=10, generator=self._generator)
        norm, scatter = found.frobenius_norm, found.frobenius_norm_error
        sum_ = Estimate(
            found.value, found.standard_error, products=found.products, converged=found.converged
        )
        size = Estimate(norm, scatter, converged=scatter <= _STANDARD_ERROR * norm)
        seen: Measurements = {"curvature/trace": sum_, "curvature/frobenius_norm": size}
        rate = _plain_sgd_rate(state)
        if rate is None or state.batch is None:
            return seen
        of_trace = trace_ratio(1.0, rate, state.batch.size)
        of_norm = frobenius_ratio(1.0, rate, state.batch.size)
        seen["stability/trace_ratio"] = replace(_mapped(sum_, of_trace, 0.0), products=0)
        seen["stability/frobenius_ratio"] = _mapped(size, of_norm, 0.0)
        return seen


def _plain_sgd_rate(state: TrainState) -> float | None:
    """The step's η, if its optimizer is SGD without momentum and decay; else None."""
    if not isinstance(state.optimizer, torch.optim.SGD):
        return None  # before a rule is read that copies second moments
    return plain_sgd_rate(read_rule(state.optimizer, state.parameters, state.learning_rates))


class Density:
    """`curvature/density`: the spectrum of the probe batch's Hessian, by Lanczos quadrature.

    An array (3, points): grid, mean density, half the spread between probes; and
    `curvature/density_nodes` (2, nodes): eigenvalue and mass. Cost: one gradient and
    100 products, whenever its share of the budget has paid for it.
    """

    name = "Density"

    def __init__(self, due: Schedule, hessian: CheckedHessian | None = None) -> None:
        self.due = due
        self._hessian = hessian or CheckedHessian()
        self.notices = self._hessian.notices
        self.applies = can_measure_loss
        self._generator = torch.Generator().manual_seed(2)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        found = spectral_density(hessian, probes=2, steps=50, generator=self._generator)
        half_spread = (found.highest - found.lowest) / 2
        return {
            "curvature/density": torch.stack([found.grid, found.density, half_spread]),
            "curvature/density_nodes": torch.stack(
                [found.nodes.flatten(), found.weights.flatten() / len(found.weights)]
            ),
        }
