"""How far confidence is from being right."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(confidence: Tensor, right: Tensor, count: Tensor) -> Tensor:
    """Expected calibration error Σ_b n_b/n · |accuracy_b − confidence_b|, 0-d, in [0, 1].

    Over 15 bins of equal width (each with its upper edge): Guo et al. 2017, arXiv 1706.04599.
    `confidence`: largest probability (n,); `right`: whether that class is the target (n,);
    `count`: which of them count (n,). Biased up where there are few in a bin. No host sync.

    >>> count = torch.tensor([True, True])
    >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False]), count)
    tensor(0.2500, dtype=torch.float64)
    """
    edges = torch.arange(1, BINS, device=confidence.device, dtype=torch.float64) / BINS
    bins = torch.bucketize(confidence.double(), edges)
    gaps = (right.double() - confidence.double()).where(count, 0.0)
    of_bins = [gaps.where(bins == b, 0.0).sum().abs() for b in range(BINS)]
    return torch.stack(of_bins).sum() / count.sum()
