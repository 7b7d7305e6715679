"""The data that an operator is summed over: batches, their weights, one set of random masks."""

from __future__ import annotations

import copy
import difflib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

Model = TypeVar("Model", bound=nn.Module)

_SEED = 0
"""Of the random streams inside every forward pass: one dropout mask for all products."""


def read_once(model: nn.Module, data: Any) -> list[Any]:
    """The batches of a loader, which is left as it was."""
    if not isinstance(data, DataLoader):
        return [data]
    with undisturbed(data) as loader, no_trace(model):
        batches = list(loader)
    if not batches:
        raise DyndiagError(
            "the DataLoader holds no batch: with drop_last=True it takes at least one full batch"
        )
    return batches


@contextmanager
def undisturbed(data: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """The same batches; a loader's own random generators are then where they were.

    Where its workers persist, by a copy without: a second iterator would end the first one, which
    may be the training's.
    """
    if not isinstance(data, DataLoader):
        yield data
        return
    owners = (data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
    generators = [g for o in owners if isinstance(g := getattr(o, "generator", None), Generator)]
    states = [g.get_state() for g in generators]
    if data.persistent_workers:
        data = copy.copy(data)
        data.__dict__.update(persistent_workers=False, _iterator=None)
    try:
        yield data
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def batch_weights(
    batches: Sequence[Any], reduction: str, size: Callable[[Any], int] | None
) -> list[float]:
    if reduction not in ("mean", "sum"):
        raise DyndiagError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if reduction == "sum" or len(batches) == 1:
        return [1.0] * len(batches)
    sizes = [(size or _length)(batch) for batch in batches]
    if sum(sizes) <= 0:
        raise DyndiagError("the batches hold no example between them: size= gave 0 for each")
    return [n / sum(sizes) for n in sizes]


def pieces(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    micro_batch: int | None = None,
    reduction: str = "mean",
    size: Callable[[Any], int] | None = None,
) -> list[tuple[Any, float]]:
    """The micro-batches that the data is taken in, and what the loss of each weighs in the total.

    Raises DyndiagError where the weighted losses of the first batch's micro-batches are not the
    loss of the batch; that costs two forward passes over it, or five where they draw dropout masks,
    which keep no graph.
    """
    if not callable(loss_fn):
        raise DyndiagError(
            "loss_fn must be a function of the model and a batch that returns the loss, but it is "
            f"a {type(loss_fn).__name__}"
        )
    batches = read_once(model, data)

    def weighted(parts: list[Any]) -> list[tuple[Any, float]]:
        weights = batch_weights(parts, reduction, size)
        # A part that weighs nothing, such as one without labels, may have no loss at all.
        return [(part, w) for part, w in zip(parts, weights, strict=True) if w != 0]

    if micro_batch is None:
        return weighted(batches)
    cuts = [cut(batch, micro_batch) for batch in batches]
    for batch, parts in zip(batches, cuts, strict=True):
        if len(parts) > 1:
            _check_cut(model, loss_fn, batch, weighted(parts))
            break
    return weighted([part for parts in cuts for part in parts])


def _check_cut(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    batch: Any,
    parts: Sequence[tuple[Any, float]],
) -> None:
    """The loss of a batch must be the weighted sum of its micro-batches' losses.

    Another cut draws other dropout masks: where these matter, they are left away.
    """

    def loss(batch: Any, masks: bool, seed: int = _SEED) -> Tensor:
        with no_trace(model, loss_fn=loss_fn), torch.no_grad():
            for module in () if masks else model.modules():
                module.training = module.training and isinstance(module, _BatchNorm)
            fix_random_streams(seed)
            return torch.as_tensor(loss_fn(model, batch)).detach()

    for masks in (True, False):
        try:
            whole = loss(batch, masks)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            if masks:
                raise
            return  # it computes its loss in train mode alone
        if whole.numel() != 1 or not whole.isfinite():
            return  # no loss to differentiate: that is said where it is differentiated
        terms = torch.stack([weight * loss(part, masks).reshape(()) for part, weight in parts])
        tolerance = math.sqrt(torch.finfo(terms.dtype).eps) * float(terms.abs().sum())
        if abs(float(whole - terms.sum())) <= tolerance:
            return
        if abs(float(whole - loss(batch, masks, _SEED + 1))) <= tolerance:
            break
    else:
        return  # it draws at random in any mode
    raise DyndiagError(
        f"cut into micro-batches, the loss of the first batch becomes {float(terms.sum()):.6g}, "
        f"but it is {float(whole):.6g}: pass reduction='sum' if it is a sum, size= with the number "
        "of labels in a batch if it is a mean over them, call model.eval() if BatchNorm couples "
        "the examples, or leave micro_batch away if the loss does"
    )


def cut(batch: Any, examples: int) -> list[Any]:
    """Micro-batches of at most `examples` examples each, in order: views, of the batch's own types.

    How many examples a batch holds is the length of its first tensor that has one. Every tensor or
    array whose first dimension has that length is cut along it, and so is every list or tuple of as
    many strings, in nested tuples, lists, mappings and dataclasses. All else goes to each
    micro-batch whole: a mask shared by all examples, an option, a 0-dimensional tensor, None. The
    last micro-batch may be shorter; a batch that is small enough comes back as it is.

    A shared tensor that happens to be as long as the batch is cut, too, and so is the time of
    sequences that stand with it first.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise DyndiagError(
            f"micro_batch must be a number of examples, 1 or more, but it is {examples!r}"
        )
    length = _length(batch, "it cannot be cut: leave micro_batch away")
    if length <= examples:
        return [batch]
    starts = range(0, length, examples)
    return [_rows(batch, length, slice(start, start + examples)) for start in starts]


def _rows(batch: Any, length: int, rows: slice) -> Any:
    """These examples of the batch."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch[rows] if batch.ndim > 0 and len(batch) == length else batch
    if isinstance(batch, MutableMapping):
        taken = copy.copy(batch)
        for key, value in batch.items():
            taken[key] = _rows(value, length, rows)
        return taken
    if isinstance(batch, Mapping):
        return {key: _rows(value, length, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if len(batch) == length and all(isinstance(item, str) for item in batch):
            return batch[rows]
        items = [_rows(item, length, rows) for item in batch]
        return getattr(batch, "_make", type(batch))(items)  # a named tuple takes them one by one
    if is_dataclass(batch) and not isinstance(batch, type):
        record = copy.copy(batch)
        for part in fields(batch):
            object.__setattr__(record, part.name, _rows(getattr(batch, part.name), length, rows))
        return record
    return batch


def number_of_examples(batch: Any) -> int | None:
    """The length of the batch's first tensor that has one; None without any."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.dim() > 0), None)


def _length(batch: Any, advice: str = "pass size=, a function from a batch to that number") -> int:
    length = number_of_examples(batch)
    if length is None:
        raise DyndiagError(
            f"a batch of type {type(batch).__name__} does not show how many examples it holds: "
            f"{advice}"
        )
    return length


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from tensors(item)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for part in fields(batch):
            yield from tensors(getattr(batch, part.name))


def chosen_parameters(
    model: nn.Module, parameters: str | Tensor | Iterable[str | Tensor] | None = None
) -> dict[str, nn.Parameter]:
    """Those parameters of the model that were asked for and require gradients, by name.

    `parameters`: names of parameters or of modules ("blocks.0" stands for all that is in it), or
    parameters themselves; None for all. The order is the model's, whatever the order asked in; tied
    weights come once, under their first name, and can be asked for by any. Frozen ones are left
    out. The wrapper of `torch.compile` does not show in names.
    """
    if not isinstance(model, nn.Module):
        raise DyndiagError(
            f"the model must be a torch.nn.Module, but it is a {type(model).__name__}: "
            "pass model, loss_fn and data in this order"
        )
    names: dict[str, nn.Parameter] = {
        name.replace("_orig_mod.", ""): p
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    wanted = set(map(id, names.values()))
    if parameters is not None:
        several = isinstance(parameters, Iterable) and not isinstance(parameters, str | Tensor)
        asked: list[Any] = list(parameters) if several else [parameters]
        wanted = {id(p) for key in asked for p in _asked_for(key, names)}
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in names.items():
        if id(p) in wanted and p.requires_grad:
            chosen.setdefault(id(p), (name, p))
    if not chosen:
        raise DyndiagError(
            "none of the parameters requires a gradient, so there is no curvature: unfreeze the "
            "parameters that you train before measuring"
            if wanted
            else "no parameters were asked for: name some, or pass parameters=None for all"
        )
    _check_one_real_device(list(chosen.values()))
    return dict(chosen.values())


def places(parameters: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each parameter stands in a flat vector of them all."""
    ends = accumulate((p.numel() for p in parameters.values()), initial=0)
    return {name: slice(*ends) for name, ends in zip(parameters, pairwise(ends), strict=True)}


def _check_one_real_device(chosen: Sequence[tuple[str, nn.Parameter]]) -> None:
    first, like = chosen[0]
    for name, p in chosen:
        if nn.parameter.is_lazy(p):
            raise DyndiagError(f"{name} has no shape yet: run the model on one batch first")
        if p.is_complex():
            raise DyndiagError(
                f"{name} is complex, and curvature is over real parameters: train its real and "
                "imaginary parts, for example by torch.view_as_real, or leave it out of parameters="
            )
        if p.device != like.device:
            raise DyndiagError(
                f"the parameters must be on one device, but {first} is on {like.device} and "
                f"{name} on {p.device}: name those of one device in parameters="
            )


def _asked_for(key: Any, names: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    if isinstance(key, Tensor):
        found = [p for p in names.values() if p is key]
        if not found:
            raise DyndiagError(
                f"a parameter of shape {tuple(key.shape)} is none of the model's: take it from "
                "model.parameters() after the model has been wrapped and moved"
            )
        return found
    if not isinstance(key, str):
        raise DyndiagError(
            "parameters must be names of parameters or modules, or parameters themselves, but one "
            f"is a {type(key).__name__}"
        )
    found = [p for name, p in names.items() if name == key or name.startswith(f"{key}.")]
    if not found:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0) or ["nothing"]
        raise DyndiagError(
            f"the model has no parameter or module {key!r} with parameters in it: the nearest is "
            f"{near[0]!r}; model.named_parameters() lists them"
        )
    if not any(p.requires_grad for p in found):
        raise DyndiagError(
            f"every parameter of {key!r} is frozen, and curvature is over those that require "
            "gradients: unfreeze it, or leave it out"
        )
    return found


def fix_random_streams(seed: int = _SEED) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
