"""The Jacobian of a model's output, by differences: nothing is differentiated by autograd here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.oracles.networks import Problem

Output = Callable[[], Tensor]


def output_of(problem: Problem) -> Tensor:
    """What the model returns when the loss function calls it."""
    caught: list[Tensor] = []
    handle = problem.model.register_forward_hook(lambda *call: caught.append(call[2]))
    problem.loss_fn(problem.model, problem.batch)
    handle.remove()
    return caught[0].detach()


def jacobian(model: nn.Module, output: Output, step: float = 1e-3) -> Tensor:
    """(outputs, weights): the output's central differences along each weight that is trained.

    Two steps of Richardson: the error is of sixth order in the step, about 1e-12 of the largest.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.cat([p.detach().flatten() for p in trained])

    @torch.no_grad()
    def at(flat: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(flat, trained)
        return output().detach().flatten()

    def column(e: Tensor) -> Tensor:
        slopes = [(at(weights + h * e) - at(weights - h * e)) / (2 * h) for h in steps]
        once = [(4 * a - b) / 3 for a, b in zip(slopes[1:], slopes, strict=False)]
        return (16 * once[1] - once[0]) / 15

    steps = [step, step / 2, step / 4]
    columns = [column(e) for e in torch.eye(len(weights), dtype=weights.dtype)]
    nn.utils.vector_to_parameters(weights, trained)
    return torch.stack(columns, dim=1)


def softmax_blocks(logits: Tensor, weights: Tensor | float) -> Tensor:
    """∂²/∂z² of Σ weight · cross-entropy over rows of logits: diag p − ppᵀ on the diagonal."""
    p = torch.softmax(logits, -1)
    each = torch.as_tensor(weights, dtype=p.dtype).expand(len(p))
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.block_diag(*(each[:, None, None] * blocks))
