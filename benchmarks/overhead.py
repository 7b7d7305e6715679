"""What the monitor costs a training, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

A GPT of about 1 M parameters on batches of 16 × 64 tokens, and a residual CNN of 0.7 M on 64
images of 32 × 32. Steps with and without the monitor alternate in blocks, so that a slow machine is
slow for both; medians over blocks. The always-on part is measured with a budget too small for any
sampled probe; the sampled part as its share of training time over a run. How many steps to take so
that a percent can be told: single pairs of blocks scatter by four.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import dyndiag
from dyndiag import schedule
from dyndiag.demos.spike import CharacterModel, next_character

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
Problem = tuple[nn.Module, torch.optim.Optimizer, list[Batch], Loss]


def gpt() -> Problem:
    torch.manual_seed(0)
    model = CharacterModel(width=144, heads=4, layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(128, (8, 16, 65))
    return model, optimizer, [(t[:, :-1], t[:, 1:]) for t in tokens], next_character


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.around = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.around(x))


def cnn() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), Residual(16, 32, 2), Residual(32, 64, 2), Residual(64, 128, 2),
        Residual(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(8)]
    return model, optimizer, batches, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])


PROBLEMS: dict[str, Callable[[], Problem]] = {"GPT": gpt, "CNN": cnn}


def block(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    loss_fn: Loss,
    after: Callable[..., None] | None,
) -> float:
    """Seconds a step, over one pass through the batches."""
    began = time.perf_counter()
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(loss=loss, batch=batch)
    return (time.perf_counter() - began) / len(batches)


def always_on(name: str, blocks: int) -> None:
    """Two equal trainings side by side, one of them watched; a block of each in turn. Then the
    other is watched: where tensors lie in memory makes equal trainings differ by a percent or two,
    which the geometric mean of both takes out."""
    schedule.GRACE = 0.0  # without it the first two seconds of samples would be in here
    trainings = [PROBLEMS[name](), PROBLEMS[name]()]
    count = sum(p.numel() for p in trainings[0][0].parameters())
    medians, steps = [], []
    for watched in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            model, optimizer, _, loss_fn = trainings[watched]
            monitor = dyndiag.Monitor(
                model, optimizer, loss_fn, run=Path(folder) / "run", budget=1e-9
            )
            after = [monitor.step if i == watched else None for i in (0, 1)]
            for _ in range(6):  # past the first 44 steps, where weights are copied at every step
                block(*trainings[0], after[0]), block(*trainings[1], after[1])
            ratios = []
            for i in range(blocks // 2):
                order = (0, 1) if i % 2 == 0 else (1, 0)
                seconds = {k: block(*trainings[k], after[k]) for k in order}
                ratios.append(seconds[watched] / seconds[1 - watched])
                steps.append(seconds[1 - watched])
            monitor.close()
        medians.append(statistics.median(ratios))
        low, high = statistics.quantiles(ratios, n=4)[::2]
        print(f"training {watched} watched: {medians[-1]:.4f} (quartiles {low:.4f} to {high:.4f})")
    schedule.GRACE = 2.0
    step = 1000 * statistics.median(steps)
    print(f"{name}, {count:,} parameters, {step:.1f} ms a step, {blocks} pairs of blocks")
    mean = statistics.geometric_mean(medians)
    print(f"always on: step with the monitor / without = {mean:.4f}; bar 1.01")


def keeping(steps: int) -> None:
    """Store, detectors and TensorBoard, on the training's thread, for the GPT's own rows."""
    from dyndiag.boundary import Boundary
    from dyndiag.keeping import Keeper

    model, optimizer, batches, loss_fn = gpt()
    with tempfile.TemporaryDirectory() as folder:
        with dyndiag.Monitor(
            model, optimizer, loss_fn, run=Path(folder) / "a", budget=1e-9
        ) as monitor:
            for _ in range(11):
                block(model, optimizer, batches, loss_fn, monitor.step)
        # Past the first 44 steps: 11 steps hold each cadence once.
        seen = [values for _, values in dyndiag.Run(Path(folder) / "a").rows()][-11:]
        for tensorboard in (False, True):
            name = f"b{int(tensorboard)}"
            keeper = Keeper(Path(folder) / name, None, Boundary(), None, tensorboard)
            seconds = 0.0
            for first in range(0, steps, 10):  # a flush a second at 100 ms a step
                rows = [(step, dict(seen[step % 11])) for step in range(first, first + 10)]
                began = time.perf_counter()
                keeper.keep(rows, {})
                seconds += time.perf_counter() - began
            keeper.close()
            what = "store, detectors and TensorBoard" if tensorboard else "store and detectors"
            print(
                f"{what}: {1e6 * seconds / steps:.0f} µs a step at "
                f"{statistics.mean(map(len, seen)):.0f} values, ten steps a flush"
            )


def sampled(seconds: float) -> None:
    """Share of training time that the sampled probes took, at the default budget of 5 %."""
    model, optimizer, batches, loss_fn = gpt()
    with tempfile.TemporaryDirectory() as folder:
        with dyndiag.Monitor(model, optimizer, loss_fn, run=folder) as monitor:
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                block(model, optimizer, batches, loss_fn, monitor.step)
        metadata = dyndiag.Run(folder).metadata
    spent = sum(cost["seconds"] for cost in metadata["cost"].values())
    samples = {name: cost["samples"] for name, cost in metadata["cost"].items()}
    print(
        f"sampled: {spent:.1f} s in {metadata['training_seconds']:.0f} s of training = "
        f"{100 * spent / metadata['training_seconds']:.1f} % (budget 5 %); samples {samples}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in PROBLEMS:
        always_on(name, arguments.blocks)
    keeping(2000)
    sampled(arguments.seconds)
