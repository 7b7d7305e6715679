"""The neural tangent kernel of a model on its data, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import number_of_examples
from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.engines.loss import in_full_precision, loss_over
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.outputs import LossOfOutput, check_products, over_batches
from dyndiag.curvature.results import Eigenpairs
from dyndiag.errors import DyndiagError

Model = TypeVar("Model", bound=nn.Module)


def neural_tangent_kernel(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    micro_batch: int | None = None,
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
) -> Operator:
    """JJᵀ/n over all numbers that the model returns for n examples: J = ∂z/∂θ, z its output.

    Square, of (examples × outputs) dimensions, batch after batch; positive semidefinite. Its
    eigenvalues other than 0 are those of JᵀJ/n, the Gauss–Newton matrix of ½ squared error summed
    over the outputs and averaged over the examples; `trace`, `eigenpairs` and the other readers
    take it as they take any operator. z is whatever `model(...)` returns that the loss is computed
    from; the loss serves to find it, and its own curvature has no part.

    `data`: one batch or a DataLoader. n: the examples, by the length of each batch's first tensor,
    or by `size`. `parameters`, `micro_batch`, `progress`, modes and that no trace is left: as for
    `gauss_newton`. Cost of a product: a backward pass and a Jacobian–vector product, 1.2 to 1.7
    gradients with one batch, whose graph is kept; with several twice over, each with a graph made
    anew.

    Source: Jacot, Gabriel & Hongler (2018), "Neural tangent kernel", arXiv 1806.07572.
    """
    loss = loss_over(
        model, loss_fn, data, parameters, micro_batch=micro_batch, size=size, progress=progress
    )
    examples = sum((size or _examples)(batch) for batch in loss.batches)
    loss = in_full_precision(loss)[0]
    total = over_batches(loss)
    lengths: list[int] = []

    def look(batch: LossOfOutput, share: float) -> Tensor:
        if not lengths:
            check_products(batch, of_loss=False)
        lengths.append(sum(z.numel() for z in batch.outputs))
        return torch.zeros(())

    total(look)

    def product(u: Tensor) -> Tensor:
        pieces_of_u = iter(u.split(lengths))

        def pulled(batch: LossOfOutput, share: float) -> Tensor:
            sizes = [z.numel() for z in batch.outputs]
            cut = zip(next(pieces_of_u).split(sizes), batch.outputs, strict=True)
            return batch.transposed_product([part.view_as(z).to(z) for part, z in cut])

        back = total(pulled) / examples
        images: list[Tensor] = []

        def pushed(batch: LossOfOutput, share: float) -> Tensor:
            images.extend(image.flatten().to(u) for image in batch.jacobian_product(back))
            return u.new_zeros(())

        total(pushed)
        return torch.cat(images)

    return Operator(product, sum(lengths), loss.dtype, loss.device)


def neural_tangent_kernel_sharpness(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    parameters: str | Tensor | Iterable[str | Tensor] | None = None,
    micro_batch: int | None = None,
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
    **options: Any,
) -> Eigenpairs:
    """λ₁(JJᵀ/n), the largest eigenvalue of the neural tangent kernel, certified.

    For ½ squared error it is the sharpness of the Gauss–Newton matrix, and with η it tells the
    regimes of a wide model's first steps apart: ηλ₁ < 2 lazy, 2 to 4 a catapult (the loss spikes
    and training comes back with ηλ₁ < 2), above 4 divergence, exactly so for a two-layer linear
    model on one example (Lewkowycz et al. 2020, arXiv 2003.02218); real models catapult up to
    larger rates.

    `options`: of `eigenpairs`, such as `k` for more eigenvalues. Everything else as for
    `neural_tangent_kernel`. Cost: 4 to 20 products.
    """
    kernel = neural_tangent_kernel(
        model,
        loss_fn,
        data,
        parameters=parameters,
        micro_batch=micro_batch,
        size=size,
        progress=progress,
    )
    return eigenpairs(kernel, **options)


def _examples(batch: Any) -> int:
    found = number_of_examples(batch)
    if found is None:
        raise DyndiagError(
            f"a batch of type {type(batch).__name__} does not show how many examples it holds: "
            "pass size=, a function from a batch to that number"
        )
    return found
