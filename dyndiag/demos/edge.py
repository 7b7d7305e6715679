"""Gradient descent on a tanh network sharpens until its step is only just stable, and stays there.

Full-batch gradient descent with a constant rate η on 500 handwritten digits. Sharpness rises
(progressive sharpening), reaches 2/η, and hovers there; near the end the rate is halved, which
doubles the threshold, and the run leaves the edge. After Cohen et al. 2021, arXiv 2103.00065.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.demos import Progress, digits
from dyndiag.monitor import Monitor

STEPS = 3000


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared distance to the one-hot label, mean over examples."""
    images, targets = batch
    return 0.5 * (model(images) - targets).square().sum(dim=1).mean()


def train(folder: Path, progress: Progress) -> None:
    """About 3,000 steps of a millisecond each, and ten times that for a sample of curvature."""
    images, labels = digits()
    images = images[:500] - images[:500].mean(dim=0)
    batch = (images, F.one_hot(labels[:500]).float())
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    # A millisecond a step: a look at the curvature every few steps takes longer than the training.
    with Monitor(model, optimizer, squared_error, run=folder, budget=5.0) as monitor:
        for step in range(STEPS):
            if step == STEPS * 5 // 6:
                optimizer.param_groups[0]["lr"] /= 2
            loss = squared_error(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=batch)
            progress(step + 1, STEPS)
