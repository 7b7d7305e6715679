"""Curvature of the probe batch's loss, and where it stands against the optimizer's threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from dyndiag.batches import same_data
from dyndiag.curvature import Operator
from dyndiag.curvature.follow import Followed, Follower
from dyndiag.optimizers import Unknown, edge_operator, preconditioned_operator, read_rule
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.clipping import clipped
from dyndiag.probes.curvature.edge_watch import EdgeWatch
from dyndiag.probes.curvature.estimates import can_measure_loss, mapped
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_TOLERANCE = 1e-2
"""Residual over value; with the certificate's 1 % that is what a threshold can be judged by."""
_PLAIN, _PRECONDITIONED = _SHARPNESS = ("curvature/sharpness", "curvature/preconditioned_sharpness")
_TWICE = "twice the edge ratio"


class Sharpness:
    """`curvature/sharpness` and, where the update rule is known, `stability/edge_ratio`.

    Sharpness is λ₁ of the probe batch's Hessian, eval mode, over the trainable parameters, followed
    from sample to sample. From the live optimizer, at this step's rate and with this step's
    gradient in its state: `curvature/preconditioned_sharpness` (where its preconditioner is not 1),
    `stability/threshold` (where one number is), `stability/edge_ratio` (χ; 1 is the edge of
    stability), `stability/warmup` (1 while a frozen preconditioner does not describe the optimizer
    yet), `stability/full_batch` (1 if the step was taken on the probe batch itself), and
    `stability/clipped_edge_ratio` (χ of the steps as they were clipped, where the loop clips by
    norm: `clipping.clipped`; 1 is no evidence of an edge there).

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
        ratio = mapped(found[judged], slope, offset)
        if line is not None:
            ratio = replace(ratio, products=0)  # paid by the sharpness
        judges = not rule.warmup and math.isfinite(ratio.value)
        if judges and (ratio.converged or ratio.provisional):
            self._watch.take(ratio.value, certified=ratio.converged)

        seen: Measurements = {name: found[name] for name in _SHARPNESS if name in found}
        if threshold is not None:
            seen["stability/threshold"] = threshold
        seen["stability/edge_ratio"] = ratio
        as_clipped = clipped(ratio, rule, state.clip_coefficients)
        if as_clipped is not None:
            seen["stability/clipped_edge_ratio"] = as_clipped
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
