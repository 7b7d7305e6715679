"""Small models of every kind that people train, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


class ConvNet(nn.Module):
    """A convolutional net with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(x.flatten(1))


class Attention(nn.Module):
    """Causal self-attention, by the fused kernel or by hand."""

    def __init__(self, width: int, heads: int, by_hand: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.by_hand, self.dropout = heads, by_hand, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        if self.by_hand:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            y = F.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A decoder with dropout: tokens (batch, length) → logits (batch, length, vocabulary)."""

    def __init__(
        self, vocabulary: int = 11, width: int = 16, by_hand: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attend = nn.ModuleList(Attention(width, 2, by_hand, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for attend in self.attend:
            x = x + self.drop(attend(self.norm(x)))
        return self.head(x)


class Recurrent(nn.Module):
    """An LSTM classifier of sequences (batch, length, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def batches(kind: str, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random batches of six for a model of the kind: mlp, conv, transformer, lstm."""
    g = torch.Generator().manual_seed(seed)
    if kind == "transformer":
        draws = [torch.randint(11, (6, 8), generator=g) for _ in range(count)]
        return [(tokens[:, :-1], tokens[:, 1:]) for tokens in draws]
    shape = {"mlp": (6, 8), "conv": (6, 1, 8, 8), "lstm": (6, 5, 8)}[kind]
    return [
        (torch.randn(shape, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(count)
    ]


def model_of(kind: str) -> nn.Module:
    return {"mlp": mlp, "conv": ConvNet, "transformer": Transformer, "lstm": Recurrent}[kind]()


KINDS = ("mlp", "conv", "transformer", "lstm")
