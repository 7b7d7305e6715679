"""Selection and dot products in blocks, against what sorting and float64 say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndiag.probes import flat
from dyndiag.probes.flat import Largest, blocks, dots, largest


@given(
    values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=300),
    count=st.integers(1, 40),
    copies=st.integers(1, 5),
)
def test_the_largest_are_those_of_sorting(values: list[float], count: int, copies: int) -> None:
    x = torch.tensor(values, dtype=torch.float64).repeat(copies)
    found = largest(x, count).sort(descending=True).values
    assert found.equal(x.sort(descending=True).values[:count])


@pytest.mark.parametrize("order", ["random", "ascending", "one row"])
def test_the_largest_of_many(order: str) -> None:
    x = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    x = x.sort().values if order == "ascending" else x
    if order == "one row":
        x[64:96] += 100
    assert largest(x, 50).sort().values.equal(x.sort().values[-50:])


def test_nan_and_infinity_count_as_largest() -> None:
    x = torch.arange(20_000.0)
    x[7], x[9000] = torch.nan, torch.inf
    assert sorted(map(str, largest(x, 2).tolist())) == ["inf", "nan"]


def test_what_passes_by_is_selected_from_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "BLOCK", 100)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    passing = Largest(30, x.device)
    for piece in x.split(37):
        passing.add(piece)
        assert sum(map(len, passing._found)) <= 8 * 30 + 37
    assert passing.smallest() == x.sort().values[-30]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dot_products_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    ones = [torch.randn(n, 3, generator=g).to(dtype) for n in (50, 0, 1)]
    others = [torch.randn(n, 3, generator=g).to(dtype) for n in (50, 0, 1)]
    found = dots(ones, others, torch.device("cpu"))
    assert found.dtype == torch.float64
    expected = [(a.double() * b.double()).sum().item() for a, b in zip(ones, others, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(flat, "BLOCK", 7)
        in_pieces = dots(ones, others, torch.device("cpu"))
    assert in_pieces.tolist() == pytest.approx(expected, rel=1e-5)


def test_strides_and_complex_numbers() -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    (both,) = blocks(x, x.contiguous())
    assert both[0].equal(both[1])
    z = torch.tensor([3 + 4j])
    assert dots([z], [z], z.device).item() == 25.0


def test_no_tensors_at_all() -> None:
    assert dots([], [], torch.device("cpu")).shape == (0,)
    assert math.isnan(largest(torch.tensor([math.nan]), 3).item())
