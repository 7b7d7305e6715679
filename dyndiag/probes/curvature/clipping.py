"""Where the steps stand against the edge as gradient clipping shortens them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dyndiag.optimizers import UpdateRule
from dyndiag.probes.curvature.estimates import mapped
from dyndiag.values import Estimate


def clipped(ratio: Estimate, rule: UpdateRule, coefficients: Sequence[Tensor]) -> Estimate | None:
    """The edge ratio with cH in the place of H: χ · c, but for decay, which is not clipped.

    `coefficients`: min(1, τ/‖g‖) of the step before and of this one. c is their harmonic mean:
    clipped gradient descent at χ > 1 does not diverge, but on a quadratic it settles in a cycle of
    two steps, on whose single steps χ · c may be anything and whose mean of 1/(χc) is exactly 1,
    whatever χ is. So **1 is no evidence of an edge of stability**: look at χ itself, at c, and for
    divergence at the loss. With momentum it can settle in slower cycles as well, below 1 (about 0.5
    for heavy ball at β = 0.9 on a small tanh network).

    An optimizer that divides by its gradients' size (Adam and its kin) undoes a constant c: it
    moves as without clipping, but its P is of clipped gradients, so χ itself is 1/c of what it
    would be without, and this is the ratio to judge it by.

    With D what decay adds to χ for each weight, χ_c lies in c · χ + (1 − c) · [min D, max D]: the
    middle of it is the value, and where D differs half of its width adds to the error. None unless
    both steps were clipped by norm (c = 1 counts), and where coupled decay passes through a
    preconditioner. Cost: one number read off the device, which a sample has waited for by then.
    """
    decays = rule.decay_range()
    if len(coefficients) < 2 or decays is None:
        return None
    c = 1 / float(torch.stack([1 / one for one in coefficients]).mean())
    if not c > 0:
        return None  # a gradient of zeros, or one that is not finite
    low, high = ((1 - c) * decay for decay in decays)
    found = mapped(ratio, c, (low + high) / 2)
    slack = (high - low) / 2
    upper = None if found.upper_bound is None else found.upper_bound + slack
    return replace(found, error=found.error + slack, upper_bound=upper, products=0)
