"""Which engine multiplies: the cheapest exact one whose products stand the check."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dyndiag.curvature.data import cut, number_of_examples
from dyndiag.curvature.engines.cached import cached
from dyndiag.curvature.engines.check import against_differences
from dyndiag.curvature.engines.engine import Check, Derivatives, Engine, Name
from dyndiag.curvature.engines.finite_differences import finite_differences
from dyndiag.curvature.engines.forward_over_reverse import forward_over_reverse
from dyndiag.curvature.engines.linearised import linearised
from dyndiag.curvature.engines.loss import Loss, first_sentence
from dyndiag.curvature.engines.rebuilt import rebuilt
from dyndiag.errors import DyndiagError

_EXACT: dict[Name, Callable[[Loss], Derivatives]] = {
    "cached": cached,
    "rebuilt": rebuilt,
    "forward_over_reverse": forward_over_reverse,
    "linearised": linearised,
}
ENGINES: tuple[str, ...] = ("auto", *_EXACT, "finite_differences")

_WHY: dict[Name, str] = {
    "cached": "one batch, so the graph of its gradient is kept",
    "rebuilt": "several batches, whose graphs are made one at a time to keep memory low",
    "forward_over_reverse": "forward derivatives of the backward pass",
    "finite_differences": "differences of gradients, for want of second derivatives",
}

_FEW = 16
"""Examples that the check is made on."""

_Key = tuple[object, ...]
_checked: WeakKeyDictionary[nn.Module, dict[_Key, Check | str]] = WeakKeyDictionary()
"""By model, then engine and what it multiplied: the check's result, or why there is none."""


def choose(loss: Loss, asked: str) -> tuple[Derivatives, Engine]:
    if asked not in ENGINES:
        raise DyndiagError(f"engine must be one of {', '.join(ENGINES)}, not {asked!r}")
    if asked != "auto":
        return _asked_for(loss, asked)  # type: ignore[arg-type]
    first: Name = "cached" if len(loss.batches) == 1 else "rebuilt"
    refused: list[str] = []
    order: tuple[Name, ...] = (first, "forward_over_reverse")
    for name in order:
        found = _attempt(loss, name)
        if isinstance(found, str):
            refused.append(f"not {name}: {found}")
            continue
        derivatives, check = found
        if check.outcome == "disagrees":
            refused.append(f"not {name}: its products are wrong, {_off(check)}")
            continue
        return derivatives, Engine(name, "; ".join((_WHY[name], *refused)), check)
    derivatives, check = finite_differences(loss)
    reason = "; ".join((_WHY["finite_differences"], *refused))
    return derivatives, Engine("finite_differences", reason, check)


def _asked_for(loss: Loss, name: Name) -> tuple[Derivatives, Engine]:
    if name == "finite_differences":
        derivatives, check = finite_differences(loss)
        return derivatives, Engine(name, "asked for", check)
    found = _attempt(loss, name)
    if isinstance(found, str):
        raise DyndiagError(
            f"the engine {name!r} cannot multiply with this Hessian ({found}): pass engine='auto' "
            "to have one chosen that can"
        )
    derivatives, check = found
    if check.outcome == "disagrees":
        warnings.warn(
            f"the products of the engine {name!r} are wrong, {_off(check)}: a kernel of the model "
            "has a wrong second derivative; pass engine='auto' or 'finite_differences'",
            stacklevel=4,
        )
    return derivatives, Engine(name, "asked for", check)


def _attempt(loss: Loss, name: Name) -> tuple[Derivatives, Check] | str:
    """The engine with its check, made at its first use; or why it cannot be had."""
    results = _checked.setdefault(loss.model, {})
    key = (
        name,
        _code(loss.loss_fn),
        tuple(loss.parameters),
        loss.dtype,
        loss.copied,
        loss.device,
        tuple((type(module), module.training) for module in loss.model.modules()),
    )
    known = results.get(key)
    if isinstance(known, str):
        return known
    try:
        derivatives = _EXACT[name](loss)
        check = known or _on_few(loss, name, derivatives)
    except torch.OutOfMemoryError as error:
        raise DyndiagError(
            "a product needs more memory than there is: pass micro_batch=, the number of examples "
            "to take at a time (a sixth of a training batch needs less than a training step)"
        ) from error
    except (RuntimeError, TypeError) as error:
        with loss.running():  # what raises here is no question of second derivatives
            loss.value_and_gradient()
        reason = results[key] = first_sentence(error)
        return reason
    results[key] = check
    return derivatives, check


def _on_few(loss: Loss, name: Name, derivatives: Derivatives) -> Check:
    """On a few examples, where the loss can be had of them: a kernel is wrong on any."""
    batch = loss.batches[0]
    if (number_of_examples(batch) or 0) > _FEW:
        try:
            few = loss.on(cut(batch, _FEW)[0])
            of_few = _EXACT[name](few)
            return against_differences(few, of_few.product, of_few.gradient)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # it takes batches of one size, or has no label among the few
    return against_differences(loss, derivatives.product, derivatives.gradient)


def _off(check: Check) -> str:
    return (
        f"by {check.difference:.1%}, where finite differences agree to {check.spread:.1%} "
        "among themselves"
    )


def _code(function: Any) -> object:
    """What a function runs: the same for each lambda made at the same place of the same functions.

    Of an object the type, whatever it holds.
    """
    found: list[object] = []
    todo, seen = [function], set[int]()
    while todo:
        of = todo.pop()
        if id(of) in seen:
            continue
        seen.add(id(of))
        held: list[Any] = []
        if isinstance(of, functools.partial):
            held = [of.func, *of.args, *of.keywords.values()]
        elif isinstance(of, MethodType):
            held = [of.__func__]
        elif isinstance(of, FunctionType):
            held = [*(of.__defaults__ or ()), *(of.__kwdefaults__ or {}).values()]
            for cell in of.__closure__ or ():
                with suppress(ValueError):  # a variable that has no value yet
                    held.append(cell.cell_contents)
            found.append(of.__code__)
        elif isinstance(of, BuiltinFunctionType):  # such as the apply of an autograd.Function
            held = [of.__self__]
            found.append(of.__qualname__)
        else:
            found.append(of if isinstance(of, type) else type(of))
        todo += [value for value in held if callable(value)]
    return tuple(found)
