"""Singular values of weight matrices and of circular convolutions: numerics only.

Small matrices are decomposed. Of large ones, and of convolutions, the Gram matrix WᵀW is never
formed: Lanczos knows it by its products, and its eigenvalues are the squared singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndiag.curvature import Operator, eigenpairs, spectral_density
from dyndiag.values import Estimate

_BLOCK = 1 << 20
"""Entries that are converted to float64 at once."""
_POSITIONS = {1: 64, 2: 16, 3: 8}
"""Of the circular grid along each dimension, at least, by number of dimensions."""
_PROBES, _STEPS = 4, 40
"""Of the quadrature. Fewer steps leave the small singular values of steep spectra unresolved."""


def singular_values(matrix: Tensor) -> Tensor:
    """All of them, (smaller side,), descending, float64; NaN if an entry is not finite.

    Of the matrix itself in float64: its Gram matrix would square the condition number. One
    host–device sync.
    """
    tall = _tall(matrix).to(torch.float64)
    if not bool(tall.isfinite().all()):
        return tall.new_full((tall.shape[1],), torch.nan)
    return torch.linalg.svdvals(tall)


def condition_number(singular_values: Tensor, rows: int) -> Tensor:
    """σ_max/σ_min in [1, ∞]; ∞ where σ_min is zero up to rounding. `rows`: the larger side."""
    largest, smallest = singular_values[0], singular_values[-1]
    zero = rows * torch.finfo(torch.float64).eps * largest
    return torch.where(smallest <= zero, torch.inf, largest / smallest).where(
        largest > 0, torch.nan
    )


def stable_rank(singular_values: Tensor) -> Tensor:
    """‖W‖_F²/σ₁², in [1, rank]; NaN for the zero matrix.

    >>> round(stable_rank(torch.tensor([3.0, 1.0, 1.0, 0.0])).item(), 4)
    1.2222
    """
    return (singular_values / singular_values[0]).square().sum()


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), in [1, rank]; NaN for the zero matrix.

    >>> round(effective_rank(torch.tensor([3.0, 1.0, 1.0, 0.0])).item(), 3)
    2.586
    """
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp()


def rank_for_share(singular_values: Tensor, share: float) -> Tensor:
    """The least number of σ, largest first, that make up `share` of Σσ; NaN for the zero matrix.

    >>> rank_for_share(torch.tensor([3.0, 1.0, 1.0, 0.0]), 0.99).item()
    3.0
    """
    held = singular_values.cumsum(0)
    few = (held < share * (1 - 1e-12) * held[-1]).sum() + 1.0  # 99 of 100 equal ones hold 99 %
    return few.where(held[-1] > 0, torch.nan)


def gram(matrix: Tensor) -> Operator:
    """WᵀW, or WWᵀ if that is smaller, in float64. A product reads the matrix once, in blocks."""
    tall = _tall(matrix)
    blocks = tall.split(max(1, _BLOCK // tall.shape[1]))

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for block in blocks:
            rows = block.to(torch.float64)
            total.addmv_(rows.T, rows @ v)
        return total

    return Operator(product, tall.shape[1], torch.float64, tall.device)


def circular_gram(
    kernel: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Operator:
    """JᵀJ of the convolution J: x ↦ kernel ∗ x on a `grid` whose ends meet.

    `kernel`: (channels out, channels in / groups, *taps), with one to three dimensions of taps.
    On vectors of channels in × positions, in the kernel's precision, float32 at least. A product
    is one convolution and its adjoint. The singular values of J are those of the kernel's Fourier
    transform at all frequencies of the grid (Sedghi, Gupta & Long 2019, arXiv 1805.10408), so that
    the largest is the maximum over frequencies.
    """
    kernel = kernel.detach()
    kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
    taps = kernel.shape[2:]
    shape = (1, kernel.shape[1] * groups, *grid(taps, stride, dilation))
    reaches = [(k - 1) * d for k, d in zip(taps, dilation, strict=True)]
    wrapped = [side for reach in reversed(reaches) for side in (0, reach)]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]

    def product(v: Tensor) -> Tensor:
        with torch.enable_grad():  # J is linear: JᵀJv is the gradient of ½‖Jv‖²
            x = v.detach().view(shape).requires_grad_()
            y = F.pad(x, wrapped, mode="circular")
            y = convolve(y, kernel, None, tuple(stride), 0, tuple(dilation), groups)
            (image,) = torch.autograd.grad(0.5 * y.square().sum(), x)
        return image.flatten()

    return Operator(product, math.prod(shape), kernel.dtype, kernel.device)


def grid(taps: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Positions along each dimension of the grid on which a convolution is measured.

    64, 16 or 8 in one, two or three dimensions, or four times as many as a window reaches beyond
    its first tap, if that is more; a multiple of the stride. On larger grids the norm can be larger
    by a factor of 1/cos(π/8) for each dimension at most, and 1/cos(π/16) = 1.02 for three taps on
    16 positions (Ehlich & Zeller 1964; stride 1). Where windows do not overlap every grid has the
    same norm: there it is the stride.

    >>> grid((3, 3), (1, 1), (1, 1)), grid((7, 7), (2, 2), (1, 1)), grid((8, 8), (8, 8), (1, 1))
    ((16, 16), (24, 24), (8, 8))
    """
    found = []
    for k, s, d in zip(taps, stride, dilation, strict=True):
        reach = (k - 1) * d
        least = max(_POSITIONS[len(taps)], 4 * reach)
        found.append(s if reach < s else s * math.ceil(least / s))
    return tuple(found)


def largest_singular_value(gram: Operator, generator: torch.Generator) -> Estimate:
    """σ₁ = √λ₁(WᵀW), by Lanczos, from below.

    Some singular value lies within `error` of it; none above `upper_bound`, but for a risk of 1e-3.
    Converged when the error is at most 0.5 % of it and the bound 1 % above it, or else ends after
    64 products.
    """
    found = eigenpairs(gram, relative_tolerance=1e-2, certificate_width=0.02, generator=generator)
    square, error = float(found.values[0]), float(found.error_bounds[0])
    assert found.upper_bound is not None
    value = _root(square)
    return Estimate(
        value=value,
        error=max(value - _root(square - error), _root(square + error) - value),
        products=found.products,
        converged=found.converged,
        upper_bound=_root(found.upper_bound),
    )


def effective_rank_by_quadrature(gram: Operator, generator: torch.Generator) -> Estimate:
    """The effective rank from tr √A and tr √A ln √A, A = WᵀW, by stochastic Lanczos quadrature.

    ln rank = ln Σσ − (Σ σ ln σ)/Σσ, with the outliers at their exact mass (`spectral_density`).
    `error` is a standard error: the scatter of four random probes, and 1/√12 of the difference that
    it makes if the two lowest nodes' mass lies as far apart as it can, at 0 and at the next node.
    What the quadrature cannot resolve makes the value too large: of 1,100 singular values by 27 %
    where σ_k = 0.98^k (two to three times `error`), by less than 1 % where σ_k = 1/k or the matrix
    is Gaussian. 160 products.
    """
    found = spectral_density(gram, probes=_PROBES, steps=_STEPS, generator=generator)
    nodes = found.nodes.clamp_min(0)
    totals, logs = _sums(nodes, found.weights)
    total, log = float(totals.mean()), float(logs.mean())
    if not total > 0:
        return Estimate(math.nan, products=found.products, converged=False)
    rank = _rank(total, log, gram.size)
    error = 0.0
    if len(nodes) > 1:  # one row alone: everything is known
        # The linear part of ln rank in each probe's own sums.
        parts = (totals * (1 + log / total) - logs) / total
        scatter = rank * float(parts.std()) / math.sqrt(len(parts))
        totals, logs = _sums(nodes, _apart(nodes, found.weights))
        apart = _rank(float(totals.mean()), float(logs.mean()), gram.size)
        error = math.hypot(scatter, (rank - apart) / math.sqrt(12))
    return Estimate(rank, error=error, products=found.products, converged=found.converged)


def _sums(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σσ/n and Σ σ ln σ/n of each probe's quadrature of the squares."""
    sigma = nodes.sqrt()
    return (weights * sigma).sum(1), (weights * torch.special.xlogy(sigma, sigma)).sum(1)


def _rank(total: float, log: float, size: int) -> float:
    return min(max(size * total * math.exp(-log / total), 1.0), float(size)) if total > 0 else 1.0


def _apart(nodes: Tensor, weights: Tensor) -> Tensor:
    """Weights of the same mean square, the two lowest nodes' moved to 0 and to the third."""
    moved = weights.clone()
    if nodes.shape[1] > 2:
        moved[:, :2] = 0.0
        part = (weights[:, :2] * nodes[:, :2]).sum(1) / nodes[:, 2]
        moved[:, 2] += part.nan_to_num(0.0, 0.0, 0.0)
    return moved


def _tall(matrix: Tensor) -> Tensor:
    """With as many rows as columns at least, in main memory where the device has no float64."""
    # Of a wide matrix LAPACK's decomposition takes three to nine times as long as of a tall one.
    matrix = matrix.detach()
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix
    return matrix if len(matrix) >= matrix.shape[1] else matrix.T


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square
