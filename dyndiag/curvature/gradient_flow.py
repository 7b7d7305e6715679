"""The sharpness that gradient flow would come to from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature import chebyshev
from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.engines.finite_differences import displaced
from dyndiag.curvature.engines.loss import Loss, loss_over, needs_copies
from dyndiag.curvature.hessian import LossHessian, hessian
from dyndiag.curvature.results import Eigenpairs
from dyndiag.errors import DyndiagError

Model = TypeVar("Model", bound=nn.Module)

_ROUNDING = 100
"""Times eps: below this share of what weights of such size could have, a gradient is noise."""
_SAFETY = 1.2
"""What the spectral radius may have been underestimated or have grown by since it was asked."""
_POWER_STEPS = 20
_REVISED_EVERY = 25
_BEFORE, _SETTLED = 10, 0.01
"""How much larger the gradient was when λ₁ is compared, and how little it may have changed by."""
_SHORTEST = 1e-6
"""Over the spectral radius: a step that has to be shorter than this is one that nothing helps."""


@dataclass(frozen=True)
class GradientFlowSharpness:
    """λ₁ of the Hessian where gradient flow ended, and how it came there."""

    value: float
    error_bound: float
    """Of λ₁ at the end of the flow, as of `eigenpairs`; without the integration's own error."""
    upper_bound: float | None
    change: float
    """What λ₁ has changed by since the gradient was ten times larger."""
    converged: bool
    """The flow came to its end, λ₁ is certified there, and `change` is at most 1 % of it."""
    time: float
    """Length of the flow, in units of learning rate · steps."""
    loss: float
    gradient_norm: float
    distance: float
    """‖θ_end − θ‖."""
    gradients: int
    """Gradients that the flow took."""
    products: int
    """Hessian-vector products that λ₁ took, at the end and ten times further away."""


def gradient_flow_sharpness(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    tolerance: float = 1e-4,
    gradient_tolerance: float = 1e-6,
    max_gradients: int = 10_000,
    progress: bool = False,
) -> GradientFlowSharpness:
    """φ(θ): the sharpness at the end of dθ/dt = −∇L from the model's weights, which stay.

    φ is constant along gradient flow, of course, and non-increasing along gradient descent where
    that could be proven (Kreisler et al. 2023, "Gradient descent monotonically decreases the
    sharpness of gradient flow solutions in scalar networks and beyond", arXiv 2305.13064), even
    while the sharpness itself rises: once φ ≤ 2/η, descent at the rate η can settle.

    The flow ends where ‖∇L‖ ≤ `gradient_tolerance` · λ‖θ‖, with λ the spectral radius of the
    Hessian on the way: weights that are off by this share along the sharpest direction have such a
    gradient, and so has a plateau that is flat enough. (In float32 no smaller share than 1.2e-5 is
    asked: `model.double()`, with its data, for more.) λ₁ may still creep there: on a 1-100-1 tanh
    network it was 30.5 at a share of 1e-5 and 39.6 at 1e-6, so `converged` asks whether it has
    settled as well. The flow ends unconverged after `max_gradients`, and has no end where the loss
    has no minimum, such as cross-entropy of data that can be separated, whose φ is 0. λ₁ is then of
    the weights reached.

    Integrated by Runge–Kutta–Chebyshev steps with an error of `tolerance` · ‖θ‖ each, whose cost
    grows with the root of λ · step only: that network's flow to 1e-6, 2,763 units long at λ up to
    40, took 3,128 gradients, where steps of 2/λ would take 55,000. `data`, `parameters`,
    `reduction`, `size`, modes and that no trace is left: as for `hessian`. `progress`: a bar over
    the orders of magnitude that the gradient has still to fall by. Memory: about a dozen vectors of
    size numbers.
    """
    if not (tolerance > 0 and gradient_tolerance > 0 and max_gradients >= 1):
        raise DyndiagError(
            "tolerance and gradient_tolerance must be above 0 and max_gradients at least 1, but "
            f"they are {tolerance}, {gradient_tolerance} and {max_gradients}"
        )
    if needs_copies(model):
        raise DyndiagError(
            "gradient flow is followed through weights and buffers of 32 or 64 bits, and some of "
            "the model's have 16: convert a copy of the model with .float() or .double()"
        )
    loss = loss_over(model, loss_fn, data, parameters, reduction=reduction, size=size)
    flow = _Flow(loss, tolerance, gradient_tolerance, max_gradients)
    ended = flow.run(progress)

    def sharpness(moved: Tensor) -> tuple[LossHessian, Eigenpairs]:
        with displaced(loss.weights, loss.split(moved)):
            found = hessian(
                model, loss_fn, data, parameters=parameters, reduction=reduction, size=size
            )
            return found, eigenpairs(found)

    _, earlier = sharpness(flow.moved_before)
    curvature, pair = sharpness(flow.moved)
    value = float(pair.values[0])
    change = value - float(earlier.values[0])
    return GradientFlowSharpness(
        value=value,
        error_bound=float(pair.error_bounds[0]),
        upper_bound=pair.upper_bound,
        change=change,
        converged=ended and pair.converged and abs(change) <= _SETTLED * abs(value),
        time=flow.time,
        loss=curvature.loss,
        gradient_norm=float(curvature.gradient.norm()),
        distance=float(flow.moved.norm()),
        gradients=flow.gradients,
        products=pair.products + earlier.products,
    )


class _Flow:
    """dθ/dt = −∇L(θ + moved), on a displacement that begins at 0.

    `moved_before` is the displacement just after the gradient was last ten times that of the end.
    """

    def __init__(self, loss: Loss, tolerance: float, end: float, budget: int) -> None:
        self._loss, self._tolerance, self._budget = loss, tolerance, budget
        self._end = max(end, _ROUNDING * torch.finfo(loss.dtype).eps)
        flat = [w.detach().reshape(-1).to(loss.dtype) for w in loss.weights]
        self._weights = torch.cat(flat).to(loss.device)
        self.moved = self.moved_before = torch.zeros_like(self._weights)
        self.time, self.gradients = 0.0, 0
        self._sharpest: Tensor | None = None

    def run(self, progress: bool) -> bool:
        """Whether it came to its end."""
        slope = self._field(self.moved)
        self._radius = self._spectral_radius(slope)
        h, since = 1 / self._radius if self._radius else 1.0, 0
        bar = _Bar(progress, self._distance_to_end(slope))
        with bar:
            while (left := self._distance_to_end(slope)) > 1:
                bar.show(left, self.gradients)
                if self.gradients >= self._budget or not math.isfinite(left):
                    return False
                h = min(h, chebyshev.longest(self._radius))
                tried = chebyshev.step(self._field, self.moved, slope, h, self._radius)
                error = float(tried.error.norm()) / (self._tolerance * self._scale())
                if error <= 1:
                    if left > _BEFORE:
                        self.moved_before = tried.y
                    self.moved, slope = tried.y, tried.slope
                    self.time += h
                since = since + 1 if error <= 1 else _REVISED_EVERY
                if since >= _REVISED_EVERY:
                    self._radius, since = self._spectral_radius(slope), 0
                finite = math.isfinite(error)
                h *= min(5.0, max(0.1, 0.8 * error ** (-1 / 3))) if finite and error else 0.1
                if error == 0:
                    h *= 50
                if h * self._radius < _SHORTEST:
                    return False
        return True

    def _field(self, moved: Tensor) -> Tensor:
        self.gradients += 1
        with self._loss.running(), displaced(self._loss.weights, self._loss.split(moved)):
            return -self._loss.value_and_gradient(displaced=True)[:-1]

    def _scale(self) -> float:
        size = float((self._weights + self.moved).norm())
        return size if size > 0 else 1.0

    def _distance_to_end(self, slope: Tensor) -> float:
        """‖∇L‖ over the one to end at: the end is at 1 or below."""
        end = self._end * self._radius * self._scale()
        norm = float(slope.norm())
        return norm / end if end > 0 else (math.inf if norm > 0 else 0.0)

    def _spectral_radius(self, slope: Tensor) -> float:
        """max |λ| by power iteration on differences of gradients, and a little more."""
        v = self._sharpest if self._sharpest is not None else slope
        if not float(v.norm()) > 0:
            v = torch.ones_like(slope)
        step = torch.finfo(slope.dtype).eps ** (1 / 3) * self._scale()
        found = 0.0
        for _ in range(_POWER_STEPS):
            v = v / v.norm()
            image = (self._field(self.moved + step * v) - slope) / step
            before, found = found, float(image.norm())
            if not (math.isfinite(found) and found > 0):
                break
            v = image
            if abs(found - before) <= 0.01 * found:
                break
        if math.isfinite(found) and found > 0:
            self._sharpest = v
        return _SAFETY * found


class _Bar:
    """The orders of magnitude of the gradient that are done."""

    def __init__(self, wanted: bool, left: float) -> None:
        self._bar: Any = None
        self._first = math.log10(left) if left > 1 else 0.0
        if wanted:
            from tqdm import tqdm

            shape = "{desc}: {percentage:3.0f}%|{bar}| {postfix}"
            self._bar = tqdm(total=self._first, desc="gradient flow", bar_format=shape)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, left: float, gradients: int) -> None:
        if self._bar is None:
            return
        done = self._first - math.log10(left)
        self._bar.n = min(max(done, 0.0), self._first)
        self._bar.set_postfix_str(f"{gradients} gradients")
