"""What memory a device has left, asked before it is taken."""

from __future__ import annotations

from pathlib import Path

import torch

from dyndiag.errors import DyndiagError

_SHARE = 0.8
"""Of what is free, for vectors: the rest is left to the products' own temporaries."""


def vectors_that_fit(size: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """How many vectors of `size` numbers four fifths of the free memory hold.

    None where the system does not tell: then nothing is refused.
    """
    free = free_bytes(device)
    return None if free is None else int(_SHARE * free) // (size * dtype.itemsize)


def require(vectors: int, size: int, dtype: torch.dtype, device: torch.device, what: str) -> None:
    """A DyndiagError, before anything is allocated, if so many vectors do not fit.

    `what` they are for: "3 eigenpairs", "30 steps of Lanczos".
    """
    fit = vectors_that_fit(size, dtype, device)
    if fit is not None and vectors > fit:
        raise DyndiagError(
            f"not enough memory for {what}: {vectors} vectors of {size:,} numbers take "
            f"{_gib(vectors * size * dtype.itemsize)}, but of the {_gib(free_bytes(device) or 0)} "
            f"free on {device} only {_SHARE:.0%} may go to vectors, the rest is for the products: "
            "free memory, ask for less, or choose fewer parameters"
        )


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there without an error, in bytes.

    CUDA: free memory, and what the allocator keeps for later. CPU: what Linux calls available, or
    less where a control group (a container's limit) allows less; None on other systems.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "cpu":
        return _free_on_linux(Path("/"))
    return None


def _free_on_linux(root: Path) -> int | None:
    try:
        entries = dict(line.split(":") for line in _lines(root / "proc/meminfo"))
        free = 1024 * int(entries["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in _lines(group / "memory.stat"))["inactive_file"]
        return min(free, max(limit - used + int(cached), 0))
    except (OSError, KeyError, ValueError):  # no limit: "max", or no such file
        return free


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
