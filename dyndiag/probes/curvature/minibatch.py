"""Curvature as mini-batch SGD meets it: batch sharpness, trace and Frobenius norm."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import fmean, stdev

import torch

from dyndiag.curvature import batch_sharpness, trace
from dyndiag.optimizers import frobenius_ratio, plain_sgd_rate, read_rule, trace_ratio
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.estimates import can_measure_loss, mapped
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_STANDARD_ERROR = 0.05
"""Of a value, at which an estimate by samples counts as converged."""
_BATCHES, _FEWEST_BATCHES = 32, 10
"""Batches that the mean of batch sharpness is over, and from how many it may be converged."""


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
        seen["stability/trace_ratio"] = replace(mapped(sum_, of_trace, 0.0), products=0)
        seen["stability/frobenius_ratio"] = mapped(size, of_norm, 0.0)
        return seen


def _plain_sgd_rate(state: TrainState) -> float | None:
    """The step's η, if its optimizer is SGD without momentum and decay; else None."""
    if not isinstance(state.optimizer, torch.optim.SGD):
        return None  # before a rule is read that copies second moments
    return plain_sgd_rate(read_rule(state.optimizer, state.parameters, state.learning_rates))
