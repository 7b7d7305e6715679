"""Which modules of a model are its blocks: what activations are told by, in order of depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

from dyndiag.probes.activations.activation_functions import has_parts
from dyndiag.probes.modules import MOST_PARTS

T = TypeVar("T")
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
# Attention and weights of attention, and gates: not the units of a layer.
_OTHER = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
GATES = (nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid)


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose outputs are the model's blocks, in model order.

    The members of its outermost stacks: of each `ModuleList` the members that have parts of their
    own (the layers of a transformer, the stages of a network), and of each `Sequential` those of
    a kind that comes there more than once (a ResNet's blocks). In a model without such stacks,
    its activation modules; without those either, its layers with weights (`Linear`, `Conv2d`,
    `LSTM`, …), before whatever function follows them. A module used in several places is named
    once. More than 128 are thinned evenly, the last one kept.

    >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> blocks(nn.TransformerEncoder(layer, num_layers=3))
    ('layers.0', 'layers.1', 'layers.2')
    >>> blocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ('1',)
    """
    stacked = dict.fromkeys(_stacked(model))
    leaves = [(name, m) for name, m in model.named_modules() if not has_parts(m)]
    found = (
        [name for name, module in model.named_modules() if module in stacked]
        or [name for name, module in leaves if is_activation(module)]
        or [name for name, module in leaves if any(p.dim() > 1 for p in module.parameters())]
    )
    return tuple(thinned([name or "model" for name in found]))


def is_activation(module: nn.Module) -> bool:
    """Whether a module applies one of the known activation functions, and nothing else."""
    known = type(module).__module__ in _ACTIVATIONS
    return known and not isinstance(module, _OTHER + GATES)


def thinned(parts: Sequence[T], most: int = MOST_PARTS) -> list[T]:
    """At most so many of them, evenly: the first, the last, and those between.

    >>> thinned(range(9), 3)
    [0, 4, 8]
    """
    if len(parts) <= most:
        return list(parts)
    return [parts[i * (len(parts) - 1) // (most - 1)] for i in range(most)]


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost stacks."""
    members = _members(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    if members:
        yield from members
    else:
        for child in module.children():
            yield from _stacked(child)


def _members(stack: nn.Module) -> list[nn.Module]:
    composite = [child for child in stack.children() if has_parts(child)]
    if isinstance(stack, nn.ModuleList):
        return composite
    count = Counter(map(_kind, composite))
    return [child for child in composite if count[_kind(child)] > 1]


def _kind(module: nn.Module) -> tuple[type, ...]:
    # All Sequentials are of one class: what they consist of tells stages from trunk and head.
    if type(module) is not nn.Sequential:
        return (type(module),)
    inside = sorted({type(child) for child in module.children()}, key=lambda kind: kind.__name__)
    return (nn.Sequential, *inside)
