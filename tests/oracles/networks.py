"""Small float64 networks, and their Hessians by a route without second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    loss_fn: LossFn
    batch: Any


def _drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights from its own generator: the global stream stays where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = 0.6 / max(1, p.shape[-1]) ** 0.5 if p.dim() > 1 else 0.1
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def _data(*shape: int, classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, shape[:1], generator=generator)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 3).double())


def mlp() -> nn.Module:
    return _drawn(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double(), 0)


def cnn() -> nn.Module:
    """With BatchNorm, whose running statistics are off 0 and 1."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(27, 3)
    ).double()
    model[1].running_mean.fill_(0.2)
    model[1].running_var.fill_(1.7)
    return _drawn(model, 1)


class Attention(nn.Module):
    """One causal block over tokens, embeddings tied to the output layer, LayerNorm."""

    def __init__(self, vocabulary: int = 5, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + mixed.transpose(1, 2).flatten(-2))


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def tokens() -> Tensor:
    return torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp, cross-entropy": lambda: Problem(mlp(), cross_entropy, _data(10, 6, classes=3)),
    "mlp, squared error": lambda: Problem(mlp(), squared_error, _data(10, 6, classes=3)),
    "cnn": lambda: Problem(cnn(), cross_entropy, _data(8, 2, 5, 5, classes=3)),
    "attention": lambda: Problem(_drawn(Attention().double(), 2), next_token, tokens()),
    "lstm": lambda: Problem(
        _drawn(Recurrent().double(), 4), cross_entropy, _data(6, 4, 2, classes=3)
    ),
}


def differentiated_twice(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The Hessian (P, P), all rows in one batched backward pass."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    rows = torch.autograd.grad(
        flat,
        parameters,
        torch.eye(len(flat), dtype=flat.dtype),
        is_grads_batched=True,
        materialize_grads=True,
    )
    return torch.cat([row.flatten(1) for row in rows], dim=1)


def dense_hessian(problem: Problem, step: float = 1e-4) -> Tensor:
    """Column i: the gradient's central difference along weight i, to about 1e-9 of the largest.

    Nothing is differentiated twice here. (Forward over reverse through `torch.func` would be an
    oracle too, but in torch 2.13 it is wrong, and not symmetric, for LayerNorm's weight.)
    """
    trained = [p for p in problem.model.parameters() if p.requires_grad]
    weights = torch.cat([p.detach().flatten() for p in trained])

    def gradient_at(flat: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(flat, trained)
        gradient = torch.autograd.grad(problem.loss_fn(problem.model, problem.batch), trained)
        return torch.cat([part.flatten() for part in gradient])

    def column(e: Tensor, h: float) -> Tensor:
        return (gradient_at(weights + h * e) - gradient_at(weights - h * e)) / (2 * h)

    columns = [  # Richardson: the error of second order in the step cancels
        (4 * column(e, step) - column(e, 2 * step)) / 3
        for e in torch.eye(len(weights), dtype=weights.dtype)
    ]
    nn.utils.vector_to_parameters(weights, trained)
    return torch.stack(columns, dim=1)
