"""How large the weights are, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndiag.probes.by_module import ByModule, by_module
from dyndiag.probes.modules import module_names
from dyndiag.probes.passing import PassingStep
from dyndiag.schedule import Every
from dyndiag.state import Measurements

_BLOCK = 1 << 20
"""Numbers that are subtracted at once on a CPU: their differences stay in its cache."""
_LARGE_BLOCK = 1 << 24
"""The same on an accelerator, where a launch costs more than the memory."""


class WeightDistances:
    """`weights/norm`, `weights/distance_from_start`, `weights/distance_from_last`.

    Of the trainable parameters θ as the step leaves them; with `/<module>`, of each module's:

    - `weights/norm`: ‖θ‖₂.
    - `weights/distance_from_start`: ‖θ − θ₀‖₂.
    - `weights/distance_from_last`: ‖θ − θ′‖₂, θ′ from the sample before, exactly `due.n` steps ago
      (11 by default); left out after any other number of steps.
    - `weights/effective_learning_rate/<module>`: η/‖θ‖² (van Laarhoven 2017, arXiv 1706.05350), for
      modules whose parameters share one learning rate η.

    All are ≥ 0, in the weights' unit; the last one in that of the learning rate over its square.

    θ₀ is what the weights were before the first sample that this process took: after a resumption
    the distance from the start begins at zero again. A parameter that is unfrozen later has its own
    θ₀, from before the first sampled step that trains it, and counts in `distance_from_last` from
    its second sample on; while frozen it is left out of everything.

    Weights in half precision are subtracted in float32: the distances are those of the stored
    weights, and updates that half precision rounds away are not in them.

    Where scaling a module's weights does not change the loss (they stand before a BatchNorm or
    LayerNorm), the gradient g is orthogonal to them. Without decay every step of plain SGD then
    makes them longer, ‖θ⁺‖² = ‖θ‖² + η²‖g‖², and what a step does depends on η/‖θ‖² alone (on η/‖θ‖
    with Adam); their curvature falls as 1/‖θ‖², so follow ‖θ‖² · sharpness there. In modules that
    are not scale-invariant η/‖θ‖² has no such meaning. Noise moves weights too, as √steps: a
    distance is no progress.

    Cost: three reads of the parameters, two of their copies and a write: measured 3 % of a step of
    a GPT with 1.3 million parameters and 1,024 tokens on a CPU core, so 0.3 % of the training at
    every 11th step, the default. Memory for two copies of the parameters. No pass, no host sync.
    """

    name = "WeightDistances"

    def __init__(self, due: Every | None = None) -> None:
        self.due = due or Every(11)
        self._kept: dict[int, _Kept] = {}
        self._all: ByModule | None = None
        self._known: ByModule | None = None

    def before(self, step: PassingStep) -> Measurements:
        self._keep(step.parameters)
        return {}

    def after(self, step: PassingStep) -> Measurements:
        kept = self._keep(step.parameters)  # here at first, where a closure hid `before`
        if not kept:
            return {}
        size, from_start, from_last = _squares(step.parameters, kept)
        every = self._all = by_module(self._all, step.names, [True] * len(kept), size.device)
        sizes = every.over(size, "sum")
        seen: Measurements = {
            every.names("weights/norm"): sizes.sqrt(),
            every.names("weights/distance_from_start"): every.over(from_start, "sum").sqrt(),
        }
        due = [held.step is not None and step.step - held.step == self.due.n for held in kept]
        if any(due):
            known = self._known = by_module(self._known, step.names, due, size.device)
            squares = known.over(known.kept(from_last), "sum")
            seen[known.names("weights/distance_from_last")] = squares.sqrt()
        for held in kept:
            held.step = step.step
        return seen | _effective_rates(step, every.modules, sizes[1:])

    def _keep(self, parameters: Sequence[nn.Parameter]) -> list[_Kept]:
        """What is kept of each parameter: its present value, of one that is new."""
        for p in parameters:
            held = self._kept.get(id(p))
            if held is None or held.start.shape != p.shape:
                self._kept[id(p)] = _Kept(p, p.detach().clone(), p.detach().clone())
            elif held.start.device != p.device:
                held.start, held.last = held.start.to(p.device), held.last.to(p.device)
        return [self._kept[id(p)] for p in parameters]


@dataclass
class _Kept:
    parameter: nn.Parameter
    """Held, so that its id remains its own."""
    start: Tensor
    last: Tensor
    step: int | None = None
    """After which `last` was copied; None before its first sample."""


def _squares(parameters: Sequence[nn.Parameter], kept: Sequence[_Kept]) -> Tensor:
    """‖θ‖², ‖θ − θ₀‖² and ‖θ − θ′‖² of each parameter, (3, parameters), float64; then θ′ ← θ."""
    device = parameters[0].device
    double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
    dtype = torch.float64 if double else torch.float32
    found: list[list[Tensor]] = [[], [], []]
    counts = [0] * len(parameters)
    for block in _blocks(parameters):
        now = [_cut(parameters[i].detach(), rows) for i, rows in block]
        start = [_cut(kept[i].start, rows) for i, rows in block]
        last = [_cut(kept[i].last, rows) for i, rows in block]
        wide = [_wide(part) for part in now]
        found[0] += torch._foreach_norm(wide, 2, dtype=dtype)
        for norms, before in zip(found[1:], (start, last), strict=True):
            change = torch._foreach_sub(wide, [_wide(part) for part in before])
            norms += torch._foreach_norm(change, 2, dtype=dtype)
        torch._foreach_copy_(last, now)
        for i, _ in block:
            counts[i] += 1
    norms = [norm for row in found for norm in row]
    if any(p.device != device for p in parameters):
        norms = [norm.to(device) for norm in norms]
    squares = torch.stack(norms).double().square_().view(3, -1)
    if squares.shape[1] == len(parameters):
        return squares
    return torch.stack([part.sum(1) for part in squares.split(counts, dim=1)], dim=1)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, slice | None]]]:
    """Pieces of the tensors, an index and rows (None: all), in lists of a bounded size."""
    most = _BLOCK if tensors[0].device.type == "cpu" else _LARGE_BLOCK
    block: list[tuple[int, slice | None]] = []
    room = most
    for i, tensor in enumerate(tensors):
        size = tensor.numel()
        if size > room and block:
            yield block
            block, room = [], most
        if size <= most:
            block.append((i, None))
            room -= size
            continue
        rows = max(1, most * len(tensor) // size)
        for first in range(0, len(tensor), rows):
            yield [(i, slice(first, first + rows))]
    if block:
        yield block


def _cut(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least; complex numbers as two."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _effective_rates(step: PassingStep, modules: Sequence[str], squares: Tensor) -> Measurements:
    """η/‖θ‖² of the modules, given each one's ‖θ‖², whose parameters share one rate."""
    rates = {
        id(p): group.get("lr") for group in step.optimizer.param_groups for p in group["params"]
    }
    of_module: dict[str, list[float | Tensor | None]] = {}
    for owner, p in zip(module_names(step.names), step.parameters, strict=True):
        of_module.setdefault(owner, []).append(rates.get(id(p)))
    together: list[tuple[float | Tensor, list[int]]] = []
    for i, module in enumerate(modules):
        rate, *others = of_module[module]
        if rate is None or not all(_same(rate, other) for other in others):
            continue
        if not together or not _same(rate, together[-1][0]):
            together.append((rate, []))
        together[-1][1].append(i)
    each = squares.unbind()
    return {
        tuple(f"weights/effective_learning_rate/{modules[i]}" for i in members): rate
        / torch.stack([each[i] for i in members])
        for rate, members in together
    }


def _same(rate: float | Tensor, other: float | Tensor | None) -> bool:
    if isinstance(rate, Tensor) or isinstance(other, Tensor):
        return rate is other  # their values may be on an accelerator
    return rate == other
