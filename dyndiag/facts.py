"""What is known about a run before it begins, for its metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dyndiag.batches import LossFunction, MicroBatches, batch_size, tensors


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def facts(model: nn.Module, optimizer: Optimizer, loss_fn: LossFunction | None) -> dict[str, Any]:
    """Versions, hardware, model, optimizer, command, commit and seed; JSON values only."""
    parameters = list(model.parameters())
    device = parameters[0].device
    return {
        "dyndiag": importlib.metadata.version("dyndiag") if _installed() else "checkout",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "started": now(),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "modules": [name for name, _ in model.named_modules() if name][:1000],
        },
        "optimizer": {
            "class": type(optimizer).__name__,
            "groups": [_numbers(group) for group in optimizer.param_groups],
        },
        "loss_function": getattr(loss_fn, "__qualname__", None) if loss_fn else None,
        "command": " ".join(sys.argv),
        "git_commit": _git_commit(),
        "seed": torch.initial_seed(),
    }


def describe_batch(batches: MicroBatches) -> dict[str, Any]:
    """Size and shapes of a batch, in words for the report."""
    shapes = [
        f"{'×'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
        for tensor in tensors(batches)
    ]
    more = f" and {len(shapes) - 6} more" if len(shapes) > 6 else ""
    return {
        "size": sum(batch_size(batch) for batch in batches.batches),
        "description": ", ".join(shapes[:6]) + more,
    }


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            numbers[key] = value.item()
        elif isinstance(value, int | float | bool | str):
            numbers[key] = value
        elif isinstance(value, tuple) and all(isinstance(v, int | float) for v in value):
            numbers[key] = list(value)
    return numbers


def _installed() -> bool:
    try:
        importlib.metadata.version("dyndiag")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=2,
            check=False,
            cwd=Path.cwd(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
