"""The Fisher information matrix of a model, true or empirical, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyndiag.curvature.data import number_of_examples, places
from dyndiag.curvature.engines.loss import in_full_precision, loss_over
from dyndiag.curvature.gauss_newton import gauss_newton_product
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.outputs import (
    LossOfOutput,
    check_products,
    norm,
    normal_like,
    over_batches,
)
from dyndiag.errors import DyndiagError

Model = TypeVar("Model", bound=nn.Module)
Kind = Literal["true", "empirical"]
Likelihood = Literal["categorical", "bernoulli", "gaussian"]


@dataclass(frozen=True)
class Fisher(Operator):
    """A Fisher matrix, with the loss and gradient that came with it for nothing."""

    loss: float
    gradient: Tensor
    """(size,), in `dtype`, on `device`."""


def fisher(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    kind: Kind = "true",
    likelihood: Likelihood = "categorical",
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    micro_batch: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
) -> Fisher:
    """Fisher matrix of the model whose negative log-likelihood is `loss_fn(model, batch)`.

    `kind="true"`: Σ cᵢ E[∇log p(y|zᵢ) ∇log p(y|zᵢ)ᵀ], y drawn from the model's own prediction
    p(y|zᵢ), exactly, by expectation and not by samples. i runs over whatever the loss is a sum
    over: examples, tokens, pixels. cᵢ is the weight that the loss gives each of them, read from the
    loss itself: 1/N for a mean, 0 for padding and ignored labels, class weights as they are. For
    these likelihoods it is the Gauss–Newton matrix, which does not depend on the labels:

    - "categorical": softmax of logits along the last dimension, or the second as `cross_entropy`
      takes them; ∂²/∂z² = diag p − ppᵀ. Smoothed and soft labels change nothing.
    - "bernoulli": sigmoid of each logit; ∂²/∂z² = p(1 − p).
    - "gaussian": z is the mean, the variance is the one at which the loss is the negative
      log-likelihood: 1 for ½ squared error summed over the outputs, C/2 for `mse_loss`, the mean
      over C outputs, whose Fisher matrix is 2/C times that of unit variance.

    A loss that is no such likelihood, or another likelihood's, is refused.

    `kind="empirical"`: (1/N) Σ gᵢgᵢᵀ, the gᵢ of the labels in the data, which is another matrix.
    An example is a row of the output's first dimension; gᵢ is the gradient of ℓᵢ where the loss is
    (1/N) Σ ℓᵢ. With `reduction="sum"` it is Σ gᵢgᵢᵀ, the loss being Σ ℓᵢ. Any loss will do that is
    a sum over examples; `likelihood` is not asked. A model that couples the examples, by BatchNorm
    in train mode, is refused: it has no gradient of one.

    `data`, `parameters`, `micro_batch`, `reduction`, `size`, `progress`, memory, errors, and that
    no trace is left: as for `gauss_newton`. Cost of a product: as of `gauss_newton`, one
    Jacobian–vector product and one backward pass. The check of the likelihood, once for each batch,
    costs some passes over the logits, of which about 18 are in memory then.

    Source: Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020);
    on the empirical one: Kunstner, Balles & Hennig, Limitations of the empirical Fisher
    approximation for natural gradient descent, NeurIPS 2019.
    """
    if kind not in get_args(Kind):
        raise DyndiagError(f"kind must be 'true' or 'empirical', not {kind!r}")
    if likelihood not in get_args(Likelihood):
        raise DyndiagError(
            f"likelihood must be one of {', '.join(get_args(Likelihood))}, not {likelihood!r}"
        )
    if kind == "empirical":
        _check_examples_apart(model)
    loss = loss_over(
        model,
        loss_fn,
        data,
        parameters,
        micro_batch=micro_batch,
        reduction=reduction,
        size=size,
        progress=progress,
    )
    total = over_batches(in_full_precision(loss)[0])
    examples = 0

    def look(batch: LossOfOutput, weight: float) -> Tensor:
        nonlocal examples
        if examples == 0:
            check_products(batch, of_loss=kind == "true")
        examples += len(_rows(batch.outputs[0]))
        if kind == "true":
            _check_likelihood(batch, likelihood)
        else:
            _check_sum_over_examples(batch)
        return weight * batch.gradient_and_loss()

    packed = total(look)
    if kind == "empirical":
        _check_rows(loss.batches, examples)

    def empirical(v: Tensor, batch: LossOfOutput, weight: float) -> Tensor:
        """Row i of the slopes is weight · ∇ℓᵢ / N, seen from the output."""
        slopes, images = batch.slopes, batch.jacobian_product(v)
        along = reduce(
            torch.add,
            (
                (_rows(r.detach()) * _rows(j)).sum(1, dtype=v.dtype)
                for r, j in zip(slopes, images, strict=True)
            ),
        )
        u = [(_rows(r.detach()) * along[:, None]).to(r.dtype).view_as(r) for r in slopes]
        scale = 1.0 if reduction == "sum" else examples * weight * weight
        return scale * batch.transposed_product(u)

    of_batch = gauss_newton_product if kind == "true" else empirical
    return Fisher(
        product=lambda v: total(lambda batch, weight: of_batch(v, batch, weight)),
        size=len(packed) - 1,
        dtype=packed.dtype,
        device=packed.device,
        parts=places(loss.parameters),
        loss=packed[-1].item(),
        gradient=packed[:-1],
    )


def _rows(output: Tensor) -> Tensor:
    """(examples, all else): the examples are the output's first dimension."""
    return output.reshape(output.shape[0] if output.dim() else 1, -1)


def _check_examples_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise DyndiagError(
                f"{name or 'the model'} takes its statistics from the batch, so no example has a "
                "gradient of its own: call model.eval() for an empirical Fisher matrix, with "
                "running statistics"
            )


def _check_rows(batches: Iterable[Any], rows: int) -> None:
    lengths = [number_of_examples(batch) for batch in batches]
    if None not in lengths and sum(n or 0 for n in lengths) != rows:
        raise DyndiagError(
            f"the first dimension of the model's output must be the examples, but it has {rows} "
            f"rows in all where the data has {sum(n or 0 for n in lengths)} examples: let the "
            "model return an output whose first dimension is the batch's"
        )


def _check_sum_over_examples(batch: LossOfOutput) -> None:
    """The slopes of some rows must not depend on the others, and every output have as many rows."""
    rows = {len(_rows(z)) for z in batch.outputs}
    if len(rows) > 1:
        raise DyndiagError(
            "the tensors of the model's output that the loss is computed from must have the "
            f"examples as first dimension, but they have {sorted(rows)} rows"
        )
    if not batch.curved or rows <= {1}:
        return
    probe = normal_like(batch.outputs, 0)
    for u in probe:
        _rows(u)[::2] = 0
    try:
        images = batch.loss_hessian_product(probe)
    except RuntimeError:  # a loss without a second derivative, which is not needed otherwise
        return
    leak = norm([_rows(image)[::2] for image in images])
    if leak > batch.tolerance * norm(images):
        raise DyndiagError(
            "the loss couples the examples of a batch, so it is not a sum over examples and none "
            "has a gradient of its own: an empirical Fisher matrix needs a loss that is"
        )


def _check_likelihood(batch: LossOfOutput, likelihood: Likelihood) -> None:
    many = all(z.dim() > 2 for z in batch.outputs)
    dims = (-1, 1) if likelihood == "categorical" and many else (-1,)
    if not batch.curved or not any(_is_likelihood(batch, likelihood, dim) for dim in dims):
        hint = {
            "categorical": "cross_entropy of logits",
            "bernoulli": "binary_cross_entropy_with_logits",
            "gaussian": "mse_loss",
        }[likelihood]
        raise DyndiagError(
            f"the loss is no weighted sum of negative log-likelihoods of a {likelihood} output, "
            "so it does not say what the true Fisher matrix averages over: pass a loss_fn that is, "
            f"such as {hint}, or another likelihood="
        )


def _is_likelihood(batch: LossOfOutput, likelihood: Likelihood, dim: int) -> bool:
    """Whether ∂²L/∂z² is c · (the likelihood's) at each position, with weights c ≥ 0 that do not
    depend on z, and where c is 0 the loss is flat.

    Random probes u: the first gives c, the second tests it, and ∇ uᵀ(∂²L/∂z²)u of the first tests
    that c is constant. Positions where the likelihood's own part is lost in rounding do not count.
    """
    tolerance = batch.tolerance
    u, other = normal_like(batch.outputs, 0), normal_like(batch.outputs, 1)
    image, cubic = _with_change(batch, u)
    of_other = batch.loss_hessian_product(other)
    for j, z in enumerate(batch.outputs):
        wide = torch.promote_types(z.dtype, torch.float32)
        at = z.detach().to(wide).requires_grad_()
        a, b = u[j].to(wide), other[j].to(wide)
        own = _own_hessian_product(likelihood, at, a, dim)
        keep = own.detach()
        over = dim if likelihood == "categorical" else ()
        squared = _sum(keep.square(), over)
        seen = squared > batch.eps * _sum(a.square(), over)
        c = torch.where(seen, _sum(keep * image[j], over) / squared, 0)
        expected = c * _own_hessian_product(likelihood, at.detach(), b, dim)
        with torch.enable_grad():
            quadratic = (c * a * own).sum()
        change = (
            torch.autograd.grad(quadratic, at)[0]
            if quadratic.requires_grad
            else torch.zeros_like(a)
        )
        size = norm([of_other[j]]) + norm([image[j]])
        slope = batch.slopes[j].detach()
        nearly = tolerance * c.abs().max()
        if (
            norm([seen * (of_other[j] - expected)]) > tolerance * size
            or norm([seen * (cubic[j] - change)]) > tolerance * (size + norm([change]))
            or norm([(seen & (c.abs() <= nearly)) * slope]) > tolerance * norm([slope])
            or bool((c < -nearly).any())
        ):
            return False
    return True


def _own_hessian_product(likelihood: Likelihood, z: Tensor, u: Tensor, dim: int) -> Tensor:
    """(∂²/∂z²) u of the negative log-likelihood, at each position; z's graph is kept."""
    if likelihood == "gaussian":
        return u
    with torch.enable_grad():
        if likelihood == "bernoulli":
            p = torch.sigmoid(z)
            return p * (1 - p) * u
        p = torch.softmax(z, dim)
        return p * (u - (p * u).sum(dim, keepdim=True))


def _with_change(batch: LossOfOutput, u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """H u and ∇ uᵀH u, H = ∂²L/∂z², both in z."""
    slopes = [(s, d) for s, d in zip(batch.slopes, u, strict=True) if s.requires_grad]
    z = list(batch.outputs)
    with torch.enable_grad():
        image = torch.autograd.grad(
            [s for s, _ in slopes],
            z,
            [d for _, d in slopes],
            create_graph=True,
            materialize_grads=True,
        )
        bent = [(i, d) for i, d in zip(image, u, strict=True) if i.requires_grad]
        if bent:
            cubic = torch.autograd.grad(
                [i for i, _ in bent],
                z,
                [d for _, d in bent],
                retain_graph=True,
                materialize_grads=True,
            )
    detached = [i.detach() for i in image]
    return detached, list(cubic) if bent else [torch.zeros_like(i) for i in detached]


def _sum(values: Tensor, over: Any) -> Tensor:
    return values if over == () else values.sum(over, keepdim=True)
