"""Log-probabilities of the likeliest tokens, from logits and from what APIs return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.divergence import blocks

_ROUNDED = 1e-2
"""By so much a step's probabilities may exceed 1: APIs round."""


def top_log_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens and their log-probabilities, (rows, k) each; no host sync."""
    k = min(k, logits.shape[1])
    tokens = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    log_p = torch.empty(len(logits), k, dtype=dtype, device=logits.device)
    for rows in blocks(logits):
        scores = logits[rows].to(dtype)
        highest, tokens[rows] = scores.topk(k, dim=1)
        log_p[rows] = highest - torch.logsumexp(scores, dim=1, keepdim=True)
    return tokens, log_p


def whole_vocabulary(given: Any) -> Tensor | None:
    """Scores over the whole vocabulary, (steps, vocabulary); None if a list of tokens is given."""
    if isinstance(given, list | tuple) and given and all(map(_is_array, given)):
        if _are_lists(given):
            return None
        given = torch.stack([torch.as_tensor(step) for step in given])
        given = given.squeeze(1) if given.dim() == 3 else given
    if not _is_array(given):
        return None
    scores = torch.as_tensor(given).detach()
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise DyndiagError(
            f"the logits of one sequence must have shape (steps, vocabulary), but they have "
            f"{tuple(scores.shape)}: pass one sequence at a time"
        )
    return scores if scores.is_floating_point() else scores.double()


def _is_array(item: Any) -> bool:
    return isinstance(item, Tensor | np.ndarray)


def _are_lists(given: Sequence[Any]) -> bool:
    """Whether this is a pair of arrays, (steps, k) each: tokens and log-probabilities."""
    if len(given) != 2 or any(part.ndim != 2 for part in given):
        return False
    return given[0].shape == given[1].shape and not torch.as_tensor(given[0]).is_floating_point()


def listed(steps: Any, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest of the listed tokens, numbered, and their log-probabilities."""
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise DyndiagError(
            "expected the logits of a sequence, (steps, vocabulary), or of each step its likeliest "
            f"tokens with their log-probabilities, but got a {type(steps).__name__}"
        )
    if all(map(_is_array, steps)) and steps:
        steps = list(zip(*steps, strict=True))
    numbers: dict[Any, int] = {}
    rows = [_likeliest(_read_step(step, t), k) for t, step in enumerate(steps, 1)]
    width = max((len(row) for row in rows), default=1)
    tokens = torch.full((len(rows), width), -1, dtype=torch.int64)
    log_p = torch.full((len(rows), width), -math.inf, dtype=torch.float64)
    for t, row in enumerate(rows):
        numbered = [numbers.setdefault(token, len(numbers)) for token, _ in row]
        tokens[t, : len(row)] = torch.tensor(numbered, dtype=torch.int64)
        log_p[t, : len(row)] = torch.tensor([value for _, value in row], dtype=torch.float64)
    return tokens, log_p


def _read_step(step: Any, t: int) -> dict[Any, float]:
    """Token → log-probability; tokens that read the same (broken characters) are put together."""
    if isinstance(step, Mapping):
        tokens, values = list(step), list(step.values())
    elif isinstance(step, tuple | list) and len(step) == 2:
        tokens, values = (x.tolist() if _is_array(x) else list(x) for x in step)
    else:
        raise DyndiagError(
            f"step {t} must be {{token: log-probability}} or (tokens, log-probabilities), but it "
            f"is a {type(step).__name__}"
        )
    if len(tokens) != len(values) or not tokens:
        raise DyndiagError(
            f"step {t} lists {len(tokens)} tokens and {len(values)} log-probabilities: expected "
            "as many of both, and at least one"
        )
    found: dict[Any, float] = {}
    for token, value in zip(tokens, values, strict=True):
        known = found.get(token)
        found[token] = float(value) if known is None else float(np.logaddexp(known, float(value)))
    total = math.fsum(math.exp(min(value, 1.0)) for value in found.values())
    if total > 1 + _ROUNDED:
        raise DyndiagError(
            f"the probabilities of step {t} add up to {total:.3g}: expected natural "
            "log-probabilities of tokens, or logits of the whole vocabulary as one 2-d tensor"
        )
    return found


def _likeliest(step: Mapping[Any, float], k: int) -> list[tuple[Any, float]]:
    return sorted(step.items(), key=lambda item: item[1], reverse=True)[:k]
