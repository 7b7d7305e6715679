"""How far two sets of weights are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndiag.errors import DyndiagError
from dyndiag.landscape.checkpoints import Checkpoint, State, check_apart, matched, read

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Distance:
    """How far the weights of b are from those of a."""

    l2: float
    """‖b − a‖₂."""
    relative: float
    """‖b − a‖₂ / ‖a‖₂; NaN where both are zero."""
    cosine: float
    """⟨a, b⟩ / (‖a‖ ‖b‖); NaN where either is zero."""
    size: int
    """Numbers that were compared."""


@dataclass(frozen=True)
class ParameterDistance(Distance):
    """The same over everything, and module by module."""

    modules: Mapping[str, Distance]
    """By the modules that own the parameters; "" for parameters of the model itself."""


def parameter_distance(
    a: Checkpoint, b: Checkpoint, model: nn.Module | None = None
) -> ParameterDistance:
    """How far the weights of two checkpoints, or of two runs, are apart: L2, relative, cosine.

    `a`, `b`: state dicts, modules or paths of files. With `model`, or where one of the two is a
    module, over its parameters; else over all entries of floating point except BatchNorm's running
    statistics. Tied weights count once. Sums are in float64.

    Unit: of the weights; relative and cosine have none. Cost: no pass, one read of both.

    Misleads: networks that differ by the order of their hidden units are the same function far
    apart, and where normalisation makes weights scale-free, a distance may be mere growth: see the
    cosine.
    """
    check_apart(a, b)
    shape = model or next((c for c in (a, b) if isinstance(c, nn.Module)), None)
    if shape is not None:
        one, other = matched(a, shape, "a"), matched(b, shape, "b")
        wanted = {name.replace("_orig_mod.", "") for name, _ in shape.named_parameters()}
        names = [name for name in one if name in wanted]
    else:
        one, other = read(a), read(b)
        names = _shared(one, other)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    sums = {module: _sums(one, other, members) for module, members in groups.items()}
    if not sums:
        raise DyndiagError("the checkpoints hold no weights of floating point to compare")
    whole = _distance(torch.stack(list(sums.values())).sum(0))
    return ParameterDistance(
        whole.l2,
        whole.relative,
        whole.cosine,
        whole.size,
        {module: _distance(found) for module, found in sums.items()},
    )


def _shared(one: State, other: State) -> list[str]:
    differ = sorted(one.keys() ^ other.keys())
    if differ:
        raise DyndiagError(
            f"a and b are not of one architecture: {differ[0]!r} is in only one of them, and so "
            f"are {len(differ) - 1} more"
        )
    seen, names = set(), []
    for name, t in one.items():
        if t.shape != other[name].shape:
            raise DyndiagError(
                f"a and b are not of one architecture: {name!r} has shape {tuple(t.shape)} in a "
                f"and {tuple(other[name].shape)} in b"
            )
        place = (t.data_ptr(), t.shape, other[name].data_ptr())
        if t.is_floating_point() and not name.endswith(_STATISTICS) and place not in seen:
            names.append(name)
            seen.add(place)
    return names


def _sums(one: State, other: State, names: list[str]) -> Tensor:
    """‖b − a‖², ‖a‖², ‖b‖², ⟨a, b⟩ and the size, float64 on the CPU."""
    total = torch.zeros(5, dtype=torch.float64)
    for name in names:
        a = one[name].reshape(-1).cpu().double()
        b = other[name].reshape(-1).cpu().double()
        parts = ((b - a).square().sum(), a @ a, b @ b, a @ b)
        total += torch.stack([*parts, torch.tensor(float(len(a)), dtype=torch.float64)])
    return total


def _distance(sums: Tensor) -> Distance:
    apart, a, b, product, size = sums.tolist()
    return Distance(
        l2=math.sqrt(apart),
        relative=math.sqrt(apart / a) if a > 0 else (math.inf if apart > 0 else math.nan),
        cosine=product / math.sqrt(a * b) if a > 0 and b > 0 else math.nan,
        size=int(size),
    )
