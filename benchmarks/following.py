"""Following the largest eigenvalue: products and errors along runs, and what a budget shows.

Two tables. `products`: eight kinds of run (four networks; a sample each step, or every tenth), 25
checkpoints each, replayed with several seeds of the follower against the float64 truth. `tracking`:
sharpness as a monitor samples it with 5 % of training time, the last value held in between, against
a float64 truth at every `TRUTH_EVERY`-th step of the same run.

    python benchmarks/following.py products [seeds]
    python benchmarks/following.py tracking [seconds of training per run]
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dyndiag
from dyndiag.curvature import eigenpairs, loss_hessian
from dyndiag.curvature.follow import Follower
from dyndiag.curvature.operator import Operator

Batch = tuple[Tensor, Tensor]
CHECKPOINTS = 25
TRUTH_EVERY = 5


class Transformer(nn.Module):
    """One decoder block over characters."""

    def __init__(self, vocabulary: int = 40, width: int = 16, context: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.08)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape
        h = self.tokens(x) + self.places(torch.arange(length))
        split = self.qkv(self.norms[0](h)).view(batch, length, 3, 2, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        hidden = torch.full((length, length), -math.inf, dtype=h.dtype).triu(1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + hidden).softmax(-1)
        h = h + self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        h = h + self.down(F.gelu(self.up(self.norms[1](h))))
        logits: Tensor = self.head(self.norms[2](h))
        return logits


@dataclass
class Problem:
    model: nn.Module
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    data: Batch
    probe: Batch
    batch_size: int | None
    """None: full batch."""
    learning_rate: float
    warm_up: int
    """Steps before the first checkpoint."""


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    target = F.one_hot(batch[1], 10).to(batch[0].dtype)
    loss: Tensor = 0.5 * (model(batch[0]) - target).square().sum(1).mean()
    return loss


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def digits(count: int) -> Batch:
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return (x[chosen] - x.mean(0)) / 0.3, torch.tensor(found.target)[chosen]


def characters(count: int, context: int) -> Batch:
    import argparse
    import inspect

    source = inspect.getsource(argparse)
    common = sorted(set(source), key=lambda c: (-source.count(c), c))[:39]
    ids = torch.tensor([common.index(c) + 1 if c in common else 0 for c in source])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - context - 1, (count,), generator=generator).tolist()
    x = torch.stack([ids[i : i + context] for i in starts])
    return x, torch.stack([ids[i + 1 : i + context + 1] for i in starts])


def mlp(width: int) -> nn.Module:
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def problem(kind: str, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    if kind == "mlp_mse":  # at the edge of stability: the top is a cluster
        data = digits(400)
        return Problem(mlp(16), squared_error, data, data, None, 0.5, 400)
    if kind == "mlp_ce":
        data = digits(600)
        return Problem(mlp(24), cross_entropy, data, data, 64, 0.1, 150)
    if kind == "gpt":  # the vector turns by more than half between samples
        data = characters(400, 16)
        probe = (data[0][:32], data[1][:32])
        return Problem(Transformer(), cross_entropy, data, probe, 8, 0.6, 200)
    x, y = digits(300)
    data = (x.view(-1, 1, 8, 8), y)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(192, 10)),
    )
    return Problem(model, cross_entropy, data, data, None, 0.8, 15)


def training(p: Problem, steps: int) -> Iterator[tuple[int, Tensor, Batch]]:
    """Plain SGD. After each step: its number, its loss, its batch."""
    optimizer = torch.optim.SGD(p.model.parameters(), lr=p.learning_rate)
    generator = torch.Generator().manual_seed(77)
    for step in range(steps):
        batch = p.data
        if p.batch_size is not None:
            chosen = torch.randint(len(p.data[0]), (p.batch_size,), generator=generator)
            batch = (p.data[0][chosen], p.data[1][chosen])
        optimizer.zero_grad()
        loss = p.loss_fn(p.model, batch)
        loss.backward()
        optimizer.step()
        yield step, loss.detach(), batch


def hessian_at(p: Problem, weights: dict[str, Tensor], dtype: torch.dtype) -> Operator:
    model = copy.deepcopy(p.model)
    model.load_state_dict(weights)
    model.eval().to(dtype)
    x, y = p.probe
    probe = (x.to(dtype) if x.is_floating_point() else x, y)
    return loss_hessian(lambda: p.loss_fn(model, probe), list(model.parameters()))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def top_two(p: Problem, weights: dict[str, Tensor]) -> tuple[np.ndarray, Tensor]:
    """The two largest eigenvalues, float64, and the largest one's vector."""
    operator = hessian_at(p, weights, torch.float64)
    found = eigenpairs(operator, 2, relative_tolerance=1e-6, max_products=300)
    return found.values.numpy(), found.vectors[0]


def products(seeds: int) -> None:
    print("run, samples every n: products a sample from the second on (provisional, certified);")
    print("share provisional; errors above 1e-3, above 1e-2, worst; median overlap of vectors")
    means = []
    for kind in ("mlp_mse", "mlp_ce", "gpt", "conv"):
        for every in (1, 10):
            p = problem(kind)
            kept = []
            for step, _, _ in training(p, p.warm_up + CHECKPOINTS * every):
                if step >= p.warm_up and (step - p.warm_up) % every == 0:
                    kept.append(copied(p.model))
            truths = [top_two(p, weights) for weights in kept]
            pairs = zip(truths[1:], truths[:-1], strict=True)
            overlap = float(np.median([abs(float(a[1] @ b[1])) for a, b in pairs]))
            operators = [hessian_at(p, weights, torch.float32) for weights in kept]
            rows = []
            for seed in range(seeds):
                follower = Follower(torch.Generator().manual_seed(1000 + seed))
                for i, (operator, (exact, _)) in enumerate(zip(operators, truths, strict=True)):
                    found = follower.largest(operator)
                    error = abs(found.value / exact[0] - 1)
                    rows.append((i, found.products, error, found.provisional))
            table = np.array(rows, dtype=float)
            later, warm, errors = table[:, 0] > 0, table[:, 3] == 1, table[:, 2]
            row = [table[c, 1].mean() for c in (later, warm, ~warm & later)]
            means.append((overlap, row[0], row[1]))
            print(
                f"{kind:8} {every:3}: {row[0]:5.2f} ({row[1]:.2f}, {row[2]:.1f}) "
                f"{warm[later].mean():4.0%} {(errors > 1e-3).sum():3} {(errors > 1e-2).sum():3} "
                f"{errors.max():.0e} of {len(table)}; {overlap:.3f}",
                flush=True,
            )
    slow = [row for row in means if row[0] >= 0.9]
    for label, chosen in (("overlap of 0.9 or more", slow), ("all eight", means)):
        average = np.mean([row[1:] for row in chosen], axis=0)
        print(f"{label}: {average[0]:.2f} with certificates, {average[1]:.2f} provisional")


def tracking(seconds: float) -> None:
    print("run: steps, samples, share of training time spent on sharpness and on all probes;")
    print("median relative error of the last value held, 90th percentile; medians without grace")
    for kind in ("mlp_mse", "mlp_ce"):
        p = problem(kind)
        p.warm_up = 0
        began, weights, spent = time.perf_counter(), {}, 0.0
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            optimizer = torch.optim.SGD(p.model.parameters(), lr=p.learning_rate)
            generator = torch.Generator().manual_seed(77)
            monitor = dyndiag.Monitor(
                p.model, optimizer, p.loss_fn, run=run, probe_batch=p.probe, tensorboard=False
            )
            step = 0
            while time.perf_counter() - began < seconds:
                batch = p.data
                if p.batch_size is not None:
                    chosen = torch.randint(len(p.data[0]), (p.batch_size,), generator=generator)
                    batch = (p.data[0][chosen], p.data[1][chosen])
                optimizer.zero_grad()
                loss = p.loss_fn(p.model, batch)
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss, batch=batch)
                if step % TRUTH_EVERY == 0:
                    weights[step] = copied(p.model)
                step += 1
            monitor.close()
            kept = dyndiag.Run(run)
            series = kept["curvature/sharpness"].dropna()
            cost, trained = kept.metadata["cost"], kept.metadata["training_seconds"]
            spent = cost["Sharpness"]["seconds"]
            everything = sum(entry["seconds"] for entry in cost.values())
        chosen_steps = sorted(weights)[:: max(1, len(weights) // 400)]
        first = int(series.index[0])
        follower, errors = Follower(torch.Generator().manual_seed(0), 1e-4), []
        for at in chosen_steps:
            if at < first:
                continue
            exact = follower.largest(hessian_at(p, weights[at], torch.float64), certify=True).value
            held = float(series[series.index <= at].iloc[-1])
            errors.append(abs(held / exact - 1))
        late = errors[len(errors) // 10 :]
        print(
            f"{kind:8}: {step} steps, {len(series)} samples, {spent / trained:.2%} and "
            f"{everything / trained:.2%} of {trained:.0f} s; median error {np.median(errors):.2%}, "
            f"90th percentile {np.quantile(errors, 0.9):.2%}; without the first tenth "
            f"{np.median(late):.2%}; {len(errors)} truths",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *number = sys.argv[1:] or ["products"]
    if what == "products":
        products(int(number[0]) if number else 20)
    else:
        tracking(float(number[0]) if number else 90.0)
