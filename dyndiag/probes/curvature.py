"""Curvature of the probe batch's loss, and where it stands against the optimizer's threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.batches import same_data
from dyndiag.curvature import (
    Eigenpairs,
    Operator,
    eigenpairs,
    loss_hessian,
    spectral_density,
    trace,
)
from dyndiag.optimizers import (
    Unknown,
    UpdateRule,
    edge_operator,
    preconditioned_operator,
    read_rule,
)
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_TOLERANCE = 1e-2
"""Residual over value; with the certificate's 1 % that is what a threshold can be judged by."""


def can_measure_loss(state: TrainState) -> bool:
    """Whether there is a loss of the probe batch, and a parameter to differentiate it by."""
    return bool(state.parameters) and state.loss_fn is not None and state.probe is not None


class Sharpness:
    """`curvature/sharpness` and, where the update rule is known, `stability/edge_ratio`.

    Sharpness is λ₁ of the probe batch's Hessian, eval mode, over the trainable parameters, by
    Lanczos with residual bound and certificate. From the live optimizer, at this step's rate and
    with this step's gradient in its state: `curvature/preconditioned_sharpness` (where its
    preconditioner is not 1), `stability/threshold` (where one number is), `stability/edge_ratio`
    (χ; 1 is the edge of stability), `stability/warmup` (1 while a frozen preconditioner does
    not describe the optimizer yet), `stability/full_batch` (1 if the step was taken on the probe
    batch itself).

    Cost: one forward and backward and 8–24 Hessian-vector products for each eigenproblem: one
    for plain SGD, one more with a preconditioner, one more where groups or decays differ.
    Each starts from the last sample's vector and an equal random part.
    """

    name = "Sharpness"

    def __init__(self, due: Schedule) -> None:
        self.due = due
        self.applies = can_measure_loss
        self.notices: list[str] = []
        self._generator = torch.Generator().manual_seed(0)
        self._warm: dict[str, Tensor] = {}

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = loss_hessian(state.probe_loss, state.parameters)
        sharpness = self._largest("sharpness", hessian)
        seen: Measurements = {"curvature/sharpness": sharpness}
        rule = read_rule(state.optimizer, state.parameters, state.learning_rates)
        if isinstance(rule, Unknown):
            self.notices.append(f"no threshold and no edge ratio: {rule.reason}")
            return seen
        if rule.preconditioned:
            preconditioned = self._largest("preconditioned", preconditioned_operator(hessian, rule))
            seen["curvature/preconditioned_sharpness"] = preconditioned
            seen = seen | self._edge(hessian, rule, preconditioned)
        else:
            seen = seen | self._edge(hessian, rule, sharpness)
        seen["stability/warmup"] = float(rule.warmup)
        seen["stability/full_batch"] = float(same_data(state.batch, state.probe))
        return seen

    def _edge(self, hessian: Operator, rule: UpdateRule, sharpness: Estimate) -> Measurements:
        line, threshold = rule.edge_ratio_line(), rule.threshold()
        if line is None or threshold is None:  # groups or decays differ: an eigenproblem of its own
            twice = self._largest("edge", edge_operator(hessian, rule))
            return {"stability/edge_ratio": _mapped(twice, 0.5, 0.0, twice.products)}
        slope, offset = line
        return {
            "stability/threshold": threshold,
            "stability/edge_ratio": _mapped(sharpness, slope, offset, 0),
        }

    def _largest(self, which: str, operator: Operator) -> Estimate:
        pairs = eigenpairs(
            operator,
            start=self._warm.get(which),
            relative_tolerance=_TOLERANCE,
            generator=self._generator,
        )
        vector = pairs.vectors[0]
        if bool(vector.isfinite().all()):
            self._warm[which] = vector.clone()
        return largest_estimate(pairs)


def largest_estimate(pairs: Eigenpairs) -> Estimate:
    """The largest eigenvalue of `eigenpairs(…, which="largest")` as an estimate."""
    return Estimate(
        value=float(pairs.values[0]),
        error=float(pairs.error_bounds[0]),
        products=pairs.products,
        converged=pairs.converged,
        upper_bound=pairs.upper_bound,
    )


def _mapped(estimate: Estimate, slope: float, offset: float, products: int) -> Estimate:
    upper = estimate.upper_bound
    return Estimate(
        value=slope * estimate.value + offset,
        error=slope * estimate.error,
        products=products,
        converged=estimate.converged,
        provisional=estimate.provisional,
        upper_bound=None if upper is None else slope * upper + offset,
    )


class BatchSharpness:
    """`curvature/batch_sharpness`: gᵀHg / gᵀg on the step's own batch, eval mode.

    One batch at a time, of the batch sharpness E_B[g_BᵀH_Bg_B / ‖g_B‖²] of Andreyev &
    Beneventano (2024, arXiv 2412.20553). Cost: one gradient and one product.
    """

    name = "BatchSharpness"

    def __init__(self, due: Schedule) -> None:
        self.due = due

    def applies(self, state: TrainState) -> bool:
        return can_measure_loss(state) and state.batch is not None

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = loss_hessian(state.batch_loss, state.parameters)
        g = hessian.gradient
        squared = g.dot(g)
        ratio = torch.where(squared > 0, g.dot(hessian.product(g)) / squared, torch.nan)
        return {"curvature/batch_sharpness": ratio}


class Trace:
    """`curvature/trace` of the probe batch's Hessian by Hutchinson's estimator, eval mode.

    `.error` is the standard error. Cost: one gradient and ten products.
    """

    name = "Trace"

    def __init__(self, due: Schedule) -> None:
        self.due = due
        self.applies = can_measure_loss
        self._generator = torch.Generator().manual_seed(1)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = loss_hessian(state.probe_loss, state.parameters)
        found = trace(hessian, max_products=10, generator=self._generator)
        return {
            "curvature/trace": Estimate(
                value=found.value,
                error=found.standard_error,
                products=found.products,
                converged=found.converged,
            )
        }


class Density:
    """`curvature/density`: the spectrum of the probe batch's Hessian, by Lanczos quadrature.

    An array (3, points): grid, mean density, half the spread between probes; and
    `curvature/density_nodes` (2, nodes): eigenvalue and mass. Cost: one gradient and
    4 · 30 products, at log-spaced steps, when its share of the budget has paid for it.
    """

    name = "Density"

    def __init__(self, due: Schedule) -> None:
        self.due = due
        self.applies = can_measure_loss
        self._generator = torch.Generator().manual_seed(2)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = loss_hessian(state.probe_loss, state.parameters)
        found = spectral_density(hessian, probes=4, steps=30, generator=self._generator)
        half_spread = (found.highest - found.lowest) / 2
        return {
            "curvature/density": torch.stack([found.grid, found.density, half_spread]),
            "curvature/density_nodes": torch.stack(
                [found.nodes.flatten(), found.weights.flatten() / len(found.weights)]
            ),
        }
