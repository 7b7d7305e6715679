"""When a second task begins, accuracy on the first falls within steps and comes back: the gap.

Handwritten digits, then the same digits rotated by a quarter turn, half of each batch replayed
from the first task. After De Lange et al. 2023, arXiv 2205.13452.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.demos import Progress, digits
from dyndiag.monitor import Monitor

STEPS = 400
"""On each task."""


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(folder: Path, progress: Progress) -> None:
    """Two tasks of 400 steps, evaluated after nearly every one."""
    images, labels = digits()
    turned = images.view(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_rows, test_rows = order[:1297], order[1297:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(1)

    def examples(source: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows = train_rows[torch.randint(len(train_rows), (count,), generator=draw)]
        return source[rows], labels[rows]

    with Monitor(model, optimizer, cross_entropy, run=folder, budget=10.0) as monitor:
        for task, source in enumerate((images, turned)):
            name = ("upright", "turned")[task]
            monitor.start_task(name, eval_batches=[(source[test_rows], labels[test_rows])])
            for step in range(STEPS):
                batch = examples(source, 64)
                if task == 1:  # half new, half replayed
                    new, old = examples(turned, 32), examples(images, 32)
                    batch = (torch.cat([new[0], old[0]]), torch.cat([new[1], old[1]]))
                loss = cross_entropy(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(loss=loss, batch=batch)
                progress(task * STEPS + step + 1, 2 * STEPS)
