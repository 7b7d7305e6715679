"""What a function works with besides its arguments: a loss function, a hook."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from dyndiag.guard.kinds import FIXED, MANY, Generator

Name = tuple[Any, Any]
"""A dict of variables and a name in it; or a closure's cell and None."""


def held(function: object) -> tuple[list[object], list[Name]]:
    """Modules and random generators that a function works with besides its arguments, and the
    variables that it can count or collect in.

    Those in its closure, its defaults, the globals it names and the object it belongs to; also by
    way of functions of the same file.
    """
    found: list[object] = []
    names: list[Name] = []
    seen: set[int] = set()
    home: dict[str, Any] | None = None
    todo = [function]
    while todo:
        value = todo.pop()
        if type(value) in FIXED or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | Generator):
            found.append(value)
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            todo += [value.__func__, *getattr(value.__self__, "__dict__", {}).values()]
            todo.append(value.__self__ if isinstance(value.__self__, nn.Module) else None)
            names += _attributes(value)
        elif isinstance(value, FunctionType):
            home = value.__globals__ if home is None else home
            if value.__globals__ is home:
                around = _surroundings(value)
                names += around
                todo += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
                todo += [content(*name) for name in around]
        elif isinstance(value, list | tuple | dict):
            if len(value) <= MANY:
                todo += value.values() if isinstance(value, dict) else value
        elif value is function:  # an object with __call__
            todo.append(getattr(value, "__call__", None))  # noqa: B004
    return found, names


def _surroundings(function: FunctionType) -> list[Name]:
    """Variables that a function refers to: of its closure, and globals."""
    found: list[Name] = [(cell, None) for cell in function.__closure__ or ()]
    found += [(function.__globals__, name) for name in _names(function)]
    return found


def _names(function: FunctionType) -> Iterator[str]:
    """Globals and attributes that a function and those inside it name."""
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        yield from code.co_names


def _attributes(method: MethodType) -> list[Name]:
    """Attributes of its object that a method and the methods it calls name."""
    own = getattr(method.__self__, "__dict__", None)
    if own is None or isinstance(method.__self__, nn.Module):
        return []
    functions, found = [method.__func__], dict[str, Name]()
    for function in functions:
        for name in _names(function) if isinstance(function, FunctionType) else ():
            if name not in found:
                found[name] = (own, name)
                functions.append(inspect.getattr_static(type(method.__self__), name, None))
    return list(found.values())


MISSING = object()


def content(where: Any, name: Any) -> Any:
    """Of a variable; `MISSING` while it has none."""
    if isinstance(where, dict):
        return where.get(name, MISSING)
    try:
        return where.cell_contents
    except ValueError:
        return MISSING


def forward_hooks(reached: Iterable[object]) -> Iterator[object]:
    """Those of the modules, but for dyndiag's own."""
    for module in reached:
        if isinstance(module, nn.Module):
            for table in (module._forward_hooks, module._forward_pre_hooks):
                yield from (h for h in table.values() if not _is_own(h))


def _is_own(hook: object) -> bool:
    return type(hook).__module__.partition(".")[0] == "dyndiag"
