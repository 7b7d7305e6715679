"""One number a parameter, over modules."""

from __future__ import annotations

import math

import torch

from dyndiag.probes.by_module import by_module

NAMES = ("a.weight", "a.bias", "b.weight", "c.weight", "c.bias")
CPU = torch.device("cpu")


def test_over_everything_and_each_module() -> None:
    counts = (True, False, True, True, True)
    which = by_module(None, NAMES, counts, CPU)
    numbers = which.kept(torch.tensor([1.0, 99.0, 2.0, -3.0, 4.0]))
    assert numbers.tolist() == [1, 2, -3, 4]
    assert which.names("x/y") == ("x/y", "x/y/a", "x/y/b", "x/y/c")
    assert which.over(numbers, "sum").tolist() == [4, 1, 2, 1]
    assert which.over(numbers, "largest").tolist() == [4, 1, 2, 4]
    assert which.over(numbers, "smallest").tolist() == [-3, 1, 2, -3]


def test_what_is_not_a_number_shows_where_it_is() -> None:
    which = by_module(None, NAMES, (True,) * 5, CPU)
    numbers = torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0])
    for how in ("sum", "largest", "smallest"):
        found = which.over(numbers, how).isnan().tolist()
        assert found == [True, True, False, False]


def test_a_module_none_of_whose_parameters_count_is_absent() -> None:
    which = by_module(None, NAMES, (True, True, False, True, True), CPU)
    assert which.modules == ("a", "c")


def test_it_is_made_anew_only_where_it_has_to() -> None:
    first = by_module(None, NAMES, (True,) * 5, CPU)
    assert by_module(first, NAMES, [True] * 5, CPU) is first
    assert by_module(first, NAMES, [False] + [True] * 4, CPU) is not first
    assert by_module(first, NAMES[:4], [True] * 4, CPU) is not first


def test_more_modules_than_have_names_are_not_told_apart() -> None:
    names = tuple(f"m{i}.weight" for i in range(129))
    which = by_module(None, names, (True,) * 129, CPU)
    assert which.names("x/y") == ("x/y",)
    for how in ("sum", "largest", "smallest"):
        assert which.over(torch.ones(129), how).shape == (1,)
