"""What the monitor costs a training, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

A GPT of about 1 M parameters on batches of 16 × 64 tokens, and a residual CNN of 0.6 M on 64
images of 32 × 32. The always-on part is measured with a budget too small for any sampled probe, in
several processes: `--measure own`, the processor time of the monitor's own calls, or `paired`, the
time of steps with it less that of steps without. The sampled part as its share of training time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import dyndiag
from dyndiag import schedule
from dyndiag.demos.spike import CharacterModel, next_character
from dyndiag.probes.forward import Hook

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


def hook_tables(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[object, object]]:
    """Where all hooks on a training are kept. Here they are all the monitor's."""
    tables = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    for module in model.modules():
        tables += [getattr(module, name) for name in vars(module) if name.startswith("_forward_")]
    tables += [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    return tables


def paired_ratio(name: str, pairs: int) -> float:
    """Two steps on each batch, one of them watched, in random order: for the other the monitor's
    hooks are off. Nothing but the monitor differs, and its tensors lie where they lie.

    The mean difference, without its upper and its lower tenth, over the mean of what is unwatched.
    """
    schedule.GRACE = 0.0  # without it the first two seconds of samples would be in here
    model, optimizer, batches, loss_fn = PROBLEMS[name]()
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        monitor = dyndiag.Monitor(model, optimizer, loss_fn, run=Path(folder) / "run", budget=1e-9)
        for _ in range(6):  # past the first 44 steps, where weights are copied at every step
            block(model, optimizer, batches, loss_fn, monitor.step)
        differences, alone = [], []
        for batch in (batches * (1 + pairs))[: pairs * len(batches)]:
            seconds = {}
            for watched in order.sample((False, True), 2):
                kept = []
                if not watched:
                    tables = hook_tables(model, optimizer)
                    kept = [(table, dict(table)) for table in tables]
                    for table in tables:
                        table.clear()
                after = monitor.step if watched else None
                seconds[watched] = block(model, optimizer, [batch], loss_fn, after)
                for table, hooks in kept:
                    table.update(hooks)
            differences.append(seconds[True] - seconds[False])
            alone.append(seconds[False])
        monitor.close()
    tenth = len(differences) // 10
    return 1 + statistics.mean(sorted(differences)[tenth:-tenth]) / statistics.mean(alone)


def own_ratio(name: str, pairs: int) -> float:
    """Processor time inside the monitor's hooks and its `step`, over the rest of the training's.
    It leaves out what that does to caches and allocator, and with it the noise of these; and what
    attention's functions take longer in forwards in which they are watched (`paired` has both)."""
    schedule.GRACE = 0.0
    model, optimizer, batches, loss_fn = PROBLEMS[name]()
    own = 0.0

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object, **named: object) -> None:
            nonlocal own
            began = time.thread_time()
            call(*arguments, **named)
            own += time.thread_time() - began

        return run

    with tempfile.TemporaryDirectory() as folder:
        monitor = dyndiag.Monitor(model, optimizer, loss_fn, run=Path(folder) / "run", budget=1e-9)
        for _ in range(6):
            block(model, optimizer, batches, loss_fn, monitor.step)
        for table in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
            table.update({key: timed(hook) for key, hook in table.items()})
        with mock.patch.object(Hook, "__call__", timed(Hook.__call__)):
            own, began = 0.0, time.thread_time()
            for _ in range(2 * pairs):
                block(model, optimizer, batches, loss_fn, timed(monitor.step))
            taken = time.thread_time() - began
        monitor.close()
    return taken / (taken - own)


MEASURES = {"own": own_ratio, "paired": paired_ratio}


def always_on(name: str, measure: str, processes: int, pairs: int) -> None:
    """In processes of their own: where tensors lie in memory makes equal trainings differ by some
    percent, and that is drawn anew in each."""
    command = [sys.executable, __file__, "--one", name, "--measure", measure, "--pairs", str(pairs)]
    ratios = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(processes)
    ]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"{name}, {measure}: step with the monitor / without = {statistics.mean(ratios):.4f} ± "
        f"{error:.4f} (standard error of {processes} processes: "
        f"{', '.join(f'{ratio:.4f}' for ratio in sorted(ratios))}); bar 1.01"
    )


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
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument(
        "--pairs", type=int, default=20, help="of passes through eight batches, in each process"
    )
    parser.add_argument("--only", choices=PROBLEMS, help="one of the two")
    parser.add_argument("--measure", choices=MEASURES, default="own")
    parser.add_argument("--one", choices=PROBLEMS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(MEASURES[arguments.measure](arguments.one, arguments.pairs))
        sys.exit()
    for name in [arguments.only] if arguments.only else PROBLEMS:
        always_on(name, arguments.measure, arguments.processes, arguments.pairs)
    if arguments.only:
        sys.exit()
    keeping(2000)
    sampled(arguments.seconds)
