"""A small transformer at too high a learning rate: long calm, then the loss jumps many times over.

A character model memorises 16 excerpts of the Python standard library's own source, with Adam at
η = 0.02. Once it has, gradients are tiny, the second moment decays, and the effective step grows
until it passes the threshold of the preconditioned sharpness; the loss jumps a few steps later.
After Bai et al. 2025, arXiv 2506.04805.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.demos import Progress
from dyndiag.monitor import Monitor

STEPS = 500
LENGTH = 64


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class CharacterModel(nn.Module):
    """Decoder over 128 characters: tokens (batch, length) → logits (batch, length, 128)."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.characters(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_character(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the next character, nats, mean over all positions."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def excerpts(count: int) -> tuple[Tensor, Tensor]:
    """Characters of the standard library's source, and each one's next: (count, 64) both."""
    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(library.glob("[a-d]*.py")))
    characters = torch.tensor(list(text)).clamp(max=127)
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(characters) - LENGTH - 1, (count,), generator=draw)
    rows = torch.stack([characters[start : start + LENGTH + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def train(folder: Path, progress: Progress) -> None:
    """500 steps on the same 16 excerpts, with a short warm-up."""
    batch = excerpts(16)
    torch.manual_seed(0)
    model = CharacterModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 30, total_iters=30)
    with Monitor(model, optimizer, next_character, run=folder, budget=10.0) as monitor:
        for step in range(STEPS):
            loss = next_character(model, batch)
            loss.backward()
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=batch)
            progress(step + 1, STEPS)
