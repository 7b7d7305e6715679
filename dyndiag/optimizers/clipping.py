"""Gradient clipping: an edge ratio that comes to 1 by itself."""

from __future__ import annotations

from dyndiag.errors import DyndiagError


def clipped_edge_ratio(edge_ratio: float, norm: float, norm_clipped: float) -> float:
    """χ · c: the edge ratio of the step as it was clipped, c = min(1, norm_clipped / norm).

    `norm`, `norm_clipped`: of the step's gradient before and after clipping, as in the series
    `gradients/norm` and `gradients/norm_clipped`; `edge_ratio`: χ without clipping, as in
    `stability/edge_ratio`.

    It is no evidence of an edge of stability. Clipped descent at χ > 1 does not diverge, whatever χ
    is: on a quadratic it settles in a cycle of two steps over which the mean of 1/(χc) is exactly
    1. Look at χ itself, at c, and for divergence at the loss.

    >>> clipped_edge_ratio(3.0, norm=4.0, norm_clipped=1.0)
    0.75
    """
    if not (norm >= 0 and norm_clipped >= 0):
        raise DyndiagError(
            f"gradient norms must be 0 or more, but they are {norm} before clipping and "
            f"{norm_clipped} after"
        )
    return edge_ratio * min(1.0, norm_clipped / norm) if norm > 0 else edge_ratio
