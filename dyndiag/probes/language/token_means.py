"""Means over the tokens of generated sequences, those that a mask lets count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError


@dataclass(frozen=True)
class Tokens:
    """The shape that all tensors of tokens have, and the device that they are worked on."""

    shape: tuple[int, ...]
    device: torch.device
    source: str

    @classmethod
    def like(cls, **tensors: Tensor | None) -> Tokens:
        for name, tensor in tensors.items():
            if tensor is not None:
                return cls(tuple(tensor.shape), tensor.device, name)
        raise DyndiagError(
            "nothing to measure of the policy: pass logits, entropy or log_probabilities"
        )

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """(sequences, length); a single dimension is of sequences with one token."""
        if tuple(tensor.shape) != self.shape:
            raise DyndiagError(
                f"{name} must have one number for each generated token, shape {self.shape} as "
                f"{self.source} has, but its shape is {tuple(tensor.shape)}: leave out the "
                "prompt's tokens in both"
            )
        tensor = real(tensor.detach()).to(self.device, non_blocking=True)
        return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)

    def mask(self, mask: Tensor | None) -> Tensor:
        """Which tokens count; all without a mask."""
        if mask is None:
            return self.rows("mask", torch.ones(self.shape, device=self.device)) != 0
        return self.rows("mask", mask) != 0

    def advantages(self, advantages: Tensor) -> Tensor:
        """One for each token, or for each sequence."""
        if tuple(advantages.shape) in (self.shape[:1], (*self.shape[:1], 1)):
            given = real(advantages.detach()).to(self.device, non_blocking=True)
            return given.reshape(-1, 1)
        if tuple(advantages.shape) != self.shape:
            raise DyndiagError(
                f"advantages must have shape {self.shape}, one for each token, or "
                f"{self.shape[:1]}, one for each sequence, but their shape is "
                f"{tuple(advantages.shape)}"
            )
        return self.rows("advantages", advantages)


def real(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sums_over(values: Tensor, counts: Tensor) -> Tensor:
    """Over sequences, with S the sum and n the number of tokens that count: Σ of S, n, S², S·n,
    n², and 1 where n > 0. (6,), float64; those of two batches add up."""
    s = values.double().where(counts, 0.0).sum(dim=-1)
    n = counts.sum(dim=-1).double()
    return torch.stack([s, n, s * s, s * n, n * n, (n > 0).double()]).sum(dim=-1)


def mean(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


def standard_error(sums: Tensor) -> Tensor:
    """Of the mean over tokens, as a ratio of two means over sequences, ΣS / Σn."""
    m, sequences = mean(sums), sums[5]
    squares = (sums[2] - 2 * m * sums[3] + m.square() * sums[4]).clamp_min(0.0)
    error = (squares * sequences / (sequences - 1)).sqrt() / sums[1]
    return error.where(sequences > 1, torch.nan)


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """−∞ where none counts."""
    one_more = values.new_full((1,), -torch.inf)
    return torch.cat([values.where(counts, -torch.inf).flatten(), one_more]).amax()
