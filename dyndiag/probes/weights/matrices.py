"""The singular values of the weight matrices: how far they stretch, and in how many directions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dyndiag.probes.modules import MOST_PARTS
from dyndiag.probes.weights.spectral_norms import (
    circular_gram,
    condition_number,
    effective_rank,
    effective_rank_by_quadrature,
    gram,
    largest_singular_value,
    rank_for_share,
    singular_values,
    stable_rank,
)
from dyndiag.probes.weights.tensors import CONVOLUTIONS, WeightTensor, weight_tensors
from dyndiag.schedule import FixedInterval, Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_LARGEST_DECOMPOSED = 1024
"""Smaller side of the largest matrices that are decomposed.

On a CPU core that takes 0.14 to 0.16 µs a parameter there (1024 × 4096), less for smaller ones; the
estimates of larger ones take 0.2 to 0.3 µs.
"""

Readings = dict[str, Tensor | Estimate]
"""Quantity → value."""


class WeightMatrices:
    """`weights/spectral_norm/<module>`, `weights/stable_rank/<module>` and more, of each matrix.

    With σ₁ ≥ σ₂ ≥ … the singular values of a weight matrix W (rows: outputs):

    - `weights/spectral_norm/<module>`: σ₁, the most that W stretches a vector. ≥ 0.
    - `weights/stable_rank/<module>`: ‖W‖_F²/σ₁² (Rudelson & Vershynin 2007), in [1, rank].
    - `weights/effective_rank/<module>`: exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), in
      [1, rank].
    - `weights/condition_number/<module>`: σ_max/σ_min, in [1, ∞].
    - `weights/rank_99/<module>`: the least number of σ that make up 99 % of Σσ (some call this the
      stable rank), 1, 2, …

    Where the smaller side is at most 1024 all are exact, by decomposition in float64. Above, σ₁ is
    an estimate from below with a certified upper bound, by Lanczos on WᵀW; the stable rank follows
    from it and the exact ‖W‖_F; the effective rank is by Lanczos quadrature, with the standard
    error of its random probes; the other two are left out, since the small σ are not had so.

    Which matrices: trainable parameters of two dimensions, as they are stored (a fused in_proj of
    attention or the gates of an LSTM as one matrix: the largest σ₁ of its parts is a lower bound);
    a parametrized weight as the layer uses it. Convolutions, grouped and transposed ones too: their
    spectral norm is σ₁ of the layer as a map between images whose borders meet, the maximum over
    the frequencies of a grid (`spectral_norms.grid`: 16 × 16 positions for 3 × 3 taps) of σ₁ of the
    kernel's Fourier transform; with zero padding it is at most that. The other quantities are of
    the kernel as a matrix, its first dimension against all others. Embeddings are left out: a table
    is looked up row by row, and its σ are no property of a map; tied to a layer, it is that
    layer's. `<module>` is the parameter's full name where a module has several. With more than 128
    matrices there is one array a quantity, `weights/spectral_norm` and so on, in model order, NaN
    for what is left out.

    Cost: reads of the parameters, no pass. Measured on a CPU core, in gradients of the same model:
    0.3 to 0.4 for a GPT of 1.5 million parameters and 1,024 tokens, 2 to 3.5 for plain CNNs of 0.5
    and 1.9 million parameters and 32 images of 32 × 32, 4 for an MLP of width 1024 and 512 rows,
    8 to 11 for one of width 1280, which is estimated. The first sample is taken at the first step;
    the next by default at every 101st, or less often, so that it all takes at most 1 % of the
    training time.

    Misleads: the product of all σ₁ bounds a network's slope only loosely. At initialisation a
    square Gaussian matrix has an effective rank of 0.80 of its side, and a condition number of
    three to four times its side in the median, of over ten times in one draw of five. Ranks say
    nothing of directions that the data do not use.
    """

    name = "WeightMatrices"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or FixedInterval(0.01, interval=101)
        self.notices: list[str] = []
        self._generator = torch.Generator().manual_seed(3)

    def applies(self, state: TrainState) -> bool:
        return bool(state.parameters)

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()  # some parametrizations change with every use in training
        weights, left_out = weight_tensors(state.model, {id(p) for p in state.parameters})
        self.notices += [_sentence(reason, names) for reason, names in left_out.items()]
        found = {weight.name: self._readings(weight) for weight in weights}
        if len(found) > MOST_PARTS:
            return _arrays(list(found.values()))
        return {
            f"weights/{quantity}/{name}": value
            for name, readings in found.items()
            for quantity, value in readings.items()
        }

    def _readings(self, weight: WeightTensor) -> Readings:
        matrix = weight.tensor.flatten(1)
        if min(matrix.shape) <= _LARGEST_DECOMPOSED:
            found = _exact(matrix)
        else:
            found = self._estimated(matrix)
        if weight.overlaps:
            conv = weight.module
            assert isinstance(conv, CONVOLUTIONS)
            operator = circular_gram(weight.tensor, conv.stride, conv.dilation, conv.groups)
            found["spectral_norm"] = largest_singular_value(operator, self._generator)
        return found

    def _estimated(self, matrix: Tensor) -> Readings:
        operator = gram(matrix)
        norm = largest_singular_value(operator, self._generator)
        square = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        return {
            "spectral_norm": norm,
            "stable_rank": _stable_rank(square, norm),
            "effective_rank": effective_rank_by_quadrature(operator, self._generator),
        }


def _exact(matrix: Tensor) -> Readings:
    sigma = singular_values(matrix)
    return {
        "spectral_norm": sigma[0],
        "stable_rank": stable_rank(sigma),
        "effective_rank": effective_rank(sigma),
        "condition_number": condition_number(sigma, max(matrix.shape)),
        "rank_99": rank_for_share(sigma, 0.99),
    }


def _stable_rank(square: float, norm: Estimate) -> Estimate:
    """‖W‖_F²/σ₁² from ‖W‖_F²: too large, if at all, since σ₁ is estimated from below."""
    if not norm.value > 0 or norm.upper_bound is None:
        return Estimate(math.nan, converged=False)
    value = square / norm.value**2
    return replace(
        norm,
        value=value,
        error=value - square / (norm.value + norm.error) ** 2,
        products=0,  # paid by the norm
        lower_bound=square / norm.upper_bound**2,
        upper_bound=None,
    )


def _arrays(found: list[Readings]) -> Measurements:
    quantities = dict.fromkeys(quantity for readings in found for quantity in readings)
    return {
        f"weights/{quantity}": torch.tensor(
            [_number(readings.get(quantity)) for readings in found], dtype=torch.float64
        )
        for quantity in quantities
    }


def _number(value: Tensor | Estimate | None) -> float:
    if value is None:
        return math.nan
    return value.value if isinstance(value, Estimate) else float(value)


def _sentence(reason: str, names: list[str]) -> str:
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"no singular values are taken of some weights ({some}): {reason}"
