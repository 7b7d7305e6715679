"""Fingerprints of weights and data, by which a kept file is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """A fingerprint of numbers and plain values in nested containers, bit for bit."""
    h = hashlib.blake2b(digest_size=16)
    _feed(h.update, value)
    return h.hexdigest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().to_dense() if value.is_sparse else value.detach()
        update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif hasattr(value, "items"):
        for key, item in value.items():
            update(repr(key).encode())
            _feed(update, item)
    elif isinstance(value, list | tuple):
        update(f"[{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif hasattr(value, "tobytes"):  # a NumPy array
        update(f"{value.dtype}{value.shape}".encode())
        update(value.tobytes())
    elif isinstance(value, str | bytes | int | float | None):
        update(repr(value).encode())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(update, {part.name: getattr(value, part.name) for part in fields(value)})
    else:
        update(type(value).__name__.encode())
