"""The largest drop within a window of evaluations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def largest_drop(values: NDArray[np.float64], window: int) -> float:
    """max A(m) − A(n) over m ≤ n in `window` consecutive values; of −A, the largest rise.

    Linear in the number of values: the largest of each window is that of the end of one block
    and the beginning of the next (van Herk 1992).

    >>> largest_drop(np.array([0.9, 0.2, 0.8]), 10), largest_drop(-np.array([0.8, 0.2, 0.9]), 10)
    (0.7, 0.7)
    """
    n, w = len(values), min(window, len(values))
    if n == 0:
        return math.nan
    padded = np.full(-(-(n + w - 1) // w) * w, -math.inf)
    padded[w - 1 : w - 1 + n] = values
    blocks = padded.reshape(-1, w)
    from_left = np.maximum.accumulate(blocks, axis=1).ravel()
    from_right = np.maximum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    highest = np.maximum(from_right[:n], from_left[w - 1 : w - 1 + n])
    return float(np.max(highest - values))
