"""How large hidden activations are, how many units take part, how many dimensions they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndiag.probes.activations.blocks import blocks, thinned
from dyndiag.probes.activations.features import effective_rank, spread, spread_rows, wide
from dyndiag.probes.activations.hidden import follow
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState

DORMANT = (0.025, 0.1)
"""Thresholds of Sokar et al.; their third one, 0, are the dead units."""
_LOW_USE = 0.01
_NUMBERS = 2**20
"""Activations converted at a time."""
_FOR_MEDIAN = 2**16
_CALLS = 8
"""Calls of a module from which rows are kept."""


class Activations:
    """Series `activations/…` of the probe batch, eval mode: sizes per block, units per layer.

    Of each block (see `blocks`), over all its output's entries a, with `/<block>`:

    - `rms` = √(mean a²) and `variance` = mean a² − (mean a)²; `max`, the largest |a|.
    - `massive`: how many |a| exceed both 100 and 1,000 times the median |a| (Sun et al. 2024,
      arXiv 2402.17762). The median is of up to 65,536 entries, so its rank is off by 0.2 %
      (standard error).
    - `rms_growth`, without a part: (rms of the last block / rms of the first)^(1/(blocks − 1)),
      the mean factor from block to block, in the order in which they run.

    Of each unit layer, the outputs h of an activation (see `follow`; a sample is an example, a
    token, or a place in an image, whose units are the channels), with `/<layer>`, and as shares of
    all units without a part, all in [0, 1]:

    - `dead`: units that are exactly zero on the whole probe batch.
    - `dormant_0.025`, `dormant_0.1`: units with mean|h_i| ≤ τ · mean_j mean|h_j| (Sokar et al.
      2023, arXiv 2302.12902); τ = 0 are the dead ones. NaN where something is not finite.
    - `low_use`: units active (h > 0; where the function has two sides, as tanh, h ≠ 0) on less
      than 1 % of samples (Dohare et al. 2024); of fewer than 100 samples that is none.

    Of both, with `/<block or layer>`: `effective_rank` = exp(−Σ p ln p), p = σ/Σσ of the centred
    features (Roy & Vetterli 2007) of at most 256 samples, always the same; 0 where nothing varies;
    `effective_rank_share` = that over the most that it can be, min(features, samples − 1).

    Misleads: a probe batch of few samples makes units look dead that are rare; with smooth
    functions (GELU, SiLU) nothing is ever exactly zero: read the dormant shares. `rms_growth`
    says nothing where blocks differ in kind. Sigmoids count as gates, not as units.

    Cost: one forward of the probe batch, some reads of its activations, and for each effective
    rank the eigenvalues of a matrix of at most 256 × 256: 0.8–0.9 of a gradient on a GPT of
    1 M parameters, 0.65 on a CNN of 0.6 M (one core). Default: 1 % of training time. Parts: at
    most 128 blocks and 128 layers, thinned evenly; shares without a part are of all layers.
    """

    name = "Activations"

    def __init__(self, due: Schedule | None = None) -> None:
        self.due = due or Budget(0.01, gradients=1)
        self.notices: list[str] = []
        self._told = False

    def applies(self, state: TrainState) -> bool:
        return state.probe is not None

    @torch.no_grad()
    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        seen = follow(state, blocks(state.model), block_output, unit_output)
        if not seen.units and not self._told:
            self._told = True
            self.notices.append(
                "no activation function (ReLU, GELU, tanh, …) of which one can tell the units was "
                "seen in the model, so no dead or dormant units are counted (scripted and fused "
                "code cannot be looked into)"
            )
        return _sizes(seen.blocks) | _units(seen.units) | _ranks(seen.blocks, seen.units)


@dataclass(frozen=True)
class BlockOutput:
    """One output of a block, summed up; 0-d tensors."""

    count: int
    total: Tensor
    squares: Tensor
    largest: Tensor
    massive: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class UnitOutput:
    """One output of a unit layer, summed up over samples."""

    count: int
    magnitude: Tensor
    """(units,): Σ|h|."""
    active: Tensor
    """(units,): on how many samples."""
    rows: Tensor | None


def block_output(rows: Tensor, call: int) -> BlockOutput:
    """Sums over (samples, features)."""
    numbers = rows.flatten()
    median = numbers[spread(len(numbers), _FOR_MEDIAN).to(rows.device)].float().abs().median()
    bound = (1000 * median).clamp(min=100)
    parts = [_sums(part, bound) for part in numbers.split(_NUMBERS)]
    total, squares, largest, massive = (torch.stack(values) for values in zip(*parts, strict=True))
    return BlockOutput(
        len(numbers), total.sum(), squares.sum(), largest.amax(), massive.sum(), _kept(rows, call)
    )


def _sums(numbers: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, a = numbers.abs(), wide(numbers)
    return a.sum(), torch.dot(a, a), size.amax(), (size > bound).sum()


def unit_output(rows: Tensor, call: int, two_sided: bool) -> UnitOutput:
    """Sums over the samples of (samples, units)."""
    parts = rows.split(max(1, _NUMBERS // rows.shape[1]))
    magnitude = torch.stack([wide(part).abs().sum(dim=0) for part in parts]).sum(dim=0)
    active = torch.stack([((p != 0) if two_sided else (p > 0)).sum(dim=0) for p in parts])
    return UnitOutput(len(rows), magnitude, active.sum(dim=0), _kept(rows, call))


def _kept(rows: Tensor, call: int) -> Tensor | None:
    return spread_rows(rows) if call < _CALLS else None


def _sizes(outputs: Mapping[str, Sequence[BlockOutput]]) -> Measurements:
    seen: Measurements = {}
    depth: list[Tensor] = []
    for name, calls in outputs.items():
        count = sum(call.count for call in calls)
        mean = torch.stack([call.total for call in calls]).sum() / count
        square = torch.stack([call.squares for call in calls]).sum() / count
        depth.append(square.sqrt())
        seen[f"activations/rms/{name}"] = depth[-1]
        # Of nothing but equal numbers rounding would leave less than nothing.
        seen[f"activations/variance/{name}"] = (square - mean.square()).clamp(min=0)
        seen[f"activations/max/{name}"] = torch.stack([call.largest for call in calls]).amax()
        seen[f"activations/massive/{name}"] = torch.stack([call.massive for call in calls]).sum()
    if len(depth) > 1:
        last = depth[-1].to(depth[0].device)
        seen["activations/rms_growth"] = (last / depth[0]) ** (1 / (len(depth) - 1))
    return seen


def unit_shares(magnitude: Tensor, active: Tensor, samples: int) -> dict[str, Tensor]:
    """How many of a layer's units are dead, dormant or of low use, from their sums over samples.

    >>> zeros = unit_shares(torch.tensor([0.0, 1.0, 99.0]), torch.tensor([0, 10, 10]), 10)
    >>> {name: int(count) for name, count in zeros.items()}
    {'dead': 1, 'dormant_0.025': 1, 'dormant_0.1': 2, 'low_use': 1}
    """
    mean = magnitude.mean()
    found = {"dead": (magnitude == 0).sum().to(magnitude.dtype)}
    for share in DORMANT:  # without a division: in a layer of zeros all units are dormant
        dormant = (magnitude <= share * mean).sum()
        found[f"dormant_{share}"] = dormant.where(mean.isfinite(), torch.nan)
    found["low_use"] = (active < _LOW_USE * samples).sum().to(magnitude.dtype)
    return found


def _units(outputs: Mapping[str, Sequence[UnitOutput]]) -> Measurements:
    seen: Measurements = {}
    parts = set(thinned(list(outputs)))
    units, counts = 0, dict[str, list[Tensor]]()
    for name, calls in outputs.items():
        magnitude = torch.stack([call.magnitude for call in calls]).sum(dim=0)
        active = torch.stack([call.active for call in calls]).sum(dim=0)
        units += len(magnitude)
        for kind, count in unit_shares(magnitude, active, sum(c.count for c in calls)).items():
            counts.setdefault(kind, []).append(count)
            if name in parts:
                seen[f"activations/{kind}/{name}"] = count / len(magnitude)
    for kind, of_layers in counts.items():
        device = of_layers[0].device
        total = torch.stack([count.to(device) for count in of_layers]).sum()
        seen[f"activations/{kind}"] = total / units
    return seen


def _ranks(
    of_blocks: Mapping[str, Sequence[BlockOutput]], of_units: Mapping[str, Sequence[UnitOutput]]
) -> Measurements:
    seen: Measurements = {}
    layers: dict[str, Sequence[BlockOutput | UnitOutput]] = dict(of_blocks)
    layers |= {name: of_units[name] for name in thinned(list(of_units))}
    for name, calls in layers.items():
        kept = [call.rows for call in calls if call.rows is not None]
        rows = spread_rows(torch.cat(kept))
        most = min(rows.shape[1], len(rows) - 1)
        if most < 1:
            continue
        rank = effective_rank(rows)
        seen[f"activations/effective_rank/{name}"] = rank
        seen[f"activations/effective_rank_share/{name}"] = rank / most
    return seen
