"""Make a long series small without losing what the eye or a finding looks for."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

BUCKETS = 4096
WINDOW = 200  # steps kept whole on each side of an event


def kept(
    steps: Steps, values: Floats, buckets: int = BUCKETS, windows: Sequence[tuple[int, int]] = ()
) -> npt.NDArray[np.intp]:
    """Indices of the points to keep: every one, where there are at most three a bucket.

    The step axis is cut into equal buckets. Of each the first point, the smallest, the largest
    and the first non-finite one stay, and of the series the last; the last point of a bucket is
    as good as the first of the next. `windows` are intervals of steps kept whole.
    """
    n = len(steps)
    if n <= 3 * buckets:
        return np.arange(n)
    width = (int(steps[-1]) - int(steps[0])) / buckets + 1e-9
    bucket = ((steps - steps[0]) / width).astype(np.int64)
    starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    finite = np.isfinite(values)
    keep = np.zeros(n, dtype=bool)
    keep[starts] = True
    keep[-1] = True
    for extreme, fill in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        filled = np.where(finite, values, fill)
        best = extreme.reduceat(filled, starts)
        hits = np.flatnonzero(finite & (filled == np.repeat(best, np.diff(np.r_[starts, n]))))
        _, first = np.unique(bucket[hits], return_index=True)
        keep[hits[first]] = True
    broken = np.flatnonzero(~finite)
    _, first = np.unique(bucket[broken], return_index=True)
    keep[broken[first]] = True
    for start, end in windows:
        keep[np.searchsorted(steps, start) : np.searchsorted(steps, end, side="right")] = True
    return np.flatnonzero(keep)


def largest(steps: Steps, values: Floats, buckets: int = 1024) -> npt.NDArray[np.intp]:
    """Indices of the largest finite point of each bucket: enough for a heat map's columns."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= buckets:
        return finite
    at, of = steps[finite], values[finite]
    bucket = ((at - at[0]) / ((int(at[-1]) - int(at[0])) / buckets + 1e-9)).astype(np.int64)
    order = np.lexsort((-of, bucket))
    _, first = np.unique(bucket[order], return_index=True)
    return np.sort(finite[order[first]])


def windows(spans: Sequence[tuple[int, int]], around: int = WINDOW) -> list[tuple[int, int]]:
    """Each span's two ends with `around` steps on each side, merged where they meet.

    >>> windows([(1000, 1010), (1300, 5000)])
    [(800, 1500), (4800, 5200)]
    """
    pieces = sorted((end - around, end + around) for span in spans for end in set(span))
    merged: list[tuple[int, int]] = []
    for start, end in pieces:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def breaks(steps: Steps) -> list[int]:
    """Indices of points that follow a gap, so that no line is drawn across it.

    Where nine tenths of the intervals are equal, a single longer one is a gap; where a schedule
    varies them, one that is more than twenty times as long as those next to it.
    """
    if len(steps) < 3:
        return []
    delta = np.diff(steps)
    usual = float(np.median(delta))
    regular = float(np.mean(delta == usual)) >= 0.9
    beside = np.maximum(np.r_[0, delta[:-1]], np.r_[delta[1:], 0])
    gap = delta > (1.5 if regular else 20) * beside
    return [int(i) + 1 for i in np.flatnonzero(gap)]


def running_median(values: Floats, half: int = 5) -> Floats:
    """Median of the `2 half + 1` values around each; non-finite left out.

    Towards the ends there are fewer, as many on either side: a series that begins with a fall would
    else seem to begin lower.
    """
    n = len(values)
    if n == 0:
        return values
    padded = np.full(n + 2 * half, np.nan)
    padded[half : half + n] = np.where(np.isfinite(values), values, np.nan)
    view = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1).copy()
    for i in range(min(half, n)):
        view[i, half + i + 1 :] = view[n - 1 - i, : half - i] = np.nan
    ordered = np.sort(view, axis=1)  # NaN last
    present = np.sum(np.isfinite(ordered), axis=1)
    middle = np.maximum(0, (present - 1) // 2)
    out = ordered[np.arange(n), middle]
    result = np.where(present > 0, out, np.nan)
    return np.where(np.isfinite(values), result, np.nan)


def bucket_medians(steps: Steps, values: Floats, buckets: int = 512) -> tuple[Steps, Floats]:
    """Middle step and median finite value of each of `buckets` equal shares of the points."""
    at, middles = [], []
    for part_steps, part in zip(
        np.array_split(steps, buckets), np.array_split(values, buckets), strict=True
    ):
        finite = part[np.isfinite(part)]
        at.append(int(part_steps[len(part_steps) // 2]))
        middles.append(float(np.median(finite)) if len(finite) else np.nan)
    return np.array(at, dtype=np.int64), np.array(middles)


def noisy(values: Floats) -> bool:
    """Whether raw values would hide their own course: they turn at every other point, and by more
    than 1 % of their range (of its logarithm where all are positive)."""
    finite = values[np.isfinite(values)]
    if len(finite) < 60:
        return False
    if finite.min() > 0:
        finite = np.log(finite)
    difference = np.diff(finite)
    turning = float(np.mean(difference[1:] * difference[:-1] < 0))
    spread = float(np.quantile(finite, 0.98) - np.quantile(finite, 0.02))
    scatter = float(np.median(np.abs(finite - running_median(finite))))
    return turning > 0.4 and scatter > 0.01 * spread


def packed(values: npt.NDArray[np.floating]) -> str:
    """Base64 of little-endian float32; what float32 cannot hold goes to its largest number."""
    limit = float(np.finfo(np.float32).max)
    finite = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
    return base64.b64encode(finite.astype("<f4").tobytes()).decode("ascii")


def packed_steps(steps: Steps) -> dict[str, object]:
    """Steps as `{"from", "n"}` where they follow each other, else with differences as integers."""
    if len(steps) == 0:
        return {"from": 0, "n": 0}
    delta = np.diff(steps)
    head: dict[str, object] = {"from": int(steps[0]), "n": len(steps)}
    if np.all(delta == 1):
        return head
    kind = "<u2" if int(delta.max(initial=0)) < 65536 else "<u4"
    head["u16" if kind == "<u2" else "u32"] = base64.b64encode(delta.astype(kind).tobytes()).decode(
        "ascii"
    )
    return head
