"""Weights to go to: state dicts, modules and files, as tensors by the model's own names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dyndiag.errors import DyndiagError

Checkpoint: TypeAlias = Mapping[str, Any] | nn.Module | str | os.PathLike[str]
"""A state dict (or a dict that holds one), a module, or a file that one was saved in."""

State: TypeAlias = dict[str, Tensor]

_HOLDERS = ("state_dict", "model_state_dict", "model", "module")
"""Under which trainers keep the weights beside optimizer and step."""
_FILES = ("model.safetensors", "pytorch_model.bin")
_COMPILED = "_orig_mod."


def read(checkpoint: Checkpoint) -> State:
    """Its tensors by name, on the device that they are on; those of a file come on the CPU."""
    if isinstance(checkpoint, nn.Module):
        found: Any = checkpoint.state_dict()
    elif isinstance(checkpoint, str | os.PathLike):
        found = _from_file(Path(checkpoint))
    else:
        found = checkpoint
    if isinstance(found, Mapping):
        found = next((found[k] for k in _HOLDERS if isinstance(found.get(k), Mapping)), found)
        tensors = {
            str(name).replace(_COMPILED, ""): value.detach()
            for name, value in found.items()
            if isinstance(value, Tensor)
        }
        if tensors:
            return tensors
    raise DyndiagError(
        "a checkpoint is a state dict, a module or the path of a file that holds a state dict, but "
        f"this one is a {type(checkpoint).__name__} without tensors by name"
    )


def of_model(model: nn.Module) -> State:
    """The model's own entries: tensors that share its memory."""
    return {name: t for name, t in read(model).items() if not nn.parameter.is_lazy(t)}


def matched(checkpoint: Checkpoint, model: nn.Module, called: str) -> State:
    """The checkpoint's tensors under the names of the model's state dict, all of them.

    They are copies where they share the model's memory, which is written over. A prefix that all of
    the model's names have in the checkpoint (`module.` of a parallel wrapper, the attribute of a
    Lightning module) is taken off, and a tied weight may stand there once. Raises DyndiagError,
    which speaks of the checkpoint as `called`, where names or shapes differ.
    """
    ours, theirs = of_model(model), read(checkpoint)
    prefix = _prefix(theirs, ours)
    if prefix:
        theirs = {k.removeprefix(prefix): t for k, t in theirs.items() if k.startswith(prefix)}
        theirs = {name: t for name, t in theirs.items() if name in ours}
    for name, twin in _ties(ours):
        if name not in theirs and twin in theirs:
            theirs[name] = theirs[twin]
    _check_fit(ours, theirs, called)
    memory = {t.data_ptr() for t in ours.values()}
    return {
        name: theirs[name].clone() if theirs[name].data_ptr() in memory else theirs[name]
        for name in ours
    }


def check_apart(a: Checkpoint, b: Checkpoint) -> None:
    """Raises DyndiagError where two state dicts are one: references to the same living weights."""
    if a is b or isinstance(a, str | os.PathLike) or isinstance(b, str | os.PathLike):
        return
    one, other = read(a), read(b)
    filled = [name for name in one if name in other and one[name].numel() > 0]
    if filled and all(one[name].data_ptr() == other[name].data_ptr() for name in filled):
        raise DyndiagError(
            "a and b are the same tensors in memory, so they cannot differ: model.state_dict() "
            "refers to the living weights, keep copy.deepcopy(model.state_dict()) of each moment"
        )


def _from_file(path: Path) -> Any:
    if path.is_dir():
        inside = [path / name for name in _FILES if (path / name).exists()]
        if not inside:
            raise DyndiagError(
                f"{path} is a folder without {' or '.join(_FILES)}: pass the file that holds the "
                "weights"
            )
        path = inside[0]
    if not path.exists():
        raise DyndiagError(f"there is no checkpoint {path}: pass the file that holds the weights")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as missing:
            raise DyndiagError(
                f"{path.name} needs one more package to be read: pip install safetensors"
            ) from missing
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for a file that it cannot take
        why = str(error).strip().splitlines()
        raise DyndiagError(
            f"{path} cannot be read as tensors alone ({why[0].rstrip('. ') if why else error!r}): "
            "load it yourself if you trust it, and pass its state dict"
        ) from error


def _prefix(theirs: State, ours: State) -> str:
    """What stands before each of the model's names in the checkpoint."""
    if not ours or all(name in theirs for name in ours):
        return ""
    first = next(iter(ours))
    found = (name.removesuffix(first) for name in theirs if name.endswith(f".{first}"))
    return next((p for p in found if all(p + name in theirs for name in ours)), "")


def _ties(ours: State) -> list[tuple[str, str]]:
    """(name, another name of the same tensor), each way round."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, t in ours.items():
        if t.numel() > 0:
            groups.setdefault((t.data_ptr(), t.shape, t.stride()), []).append(name)
    return [(a, b) for names in groups.values() for a in names for b in names if a != b]


def _check_fit(ours: State, theirs: State, called: str) -> None:
    lacks = [name for name in ours if name not in theirs]
    has = [name for name in theirs if name not in ours]
    if lacks or has:
        parts = [f"it lacks {_some(lacks)} of the model's"] if lacks else []
        parts += [f"the model lacks {_some(has)} of its"] if has else []
        raise DyndiagError(
            f"{called} does not fit the model, whose entries it must have: {', and '.join(parts)}"
        )
    for name, t in ours.items():
        if theirs[name].shape != t.shape:
            raise DyndiagError(
                f"{called} does not fit the model: {name} has shape {tuple(theirs[name].shape)} "
                f"in it, and {tuple(t.shape)} in the model"
            )


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
