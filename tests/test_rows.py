"""Values by step, on their way to the store."""

from __future__ import annotations

import numpy as np
import torch

from dyndiag.rows import Rows
from dyndiag.values import Estimate


def test_rows_come_in_step_order_once() -> None:
    rows = Rows()
    rows.add(3, {"a/x": 3.0})
    rows.add(1, {"a/x": 1.0})
    rows.add(3, {"a/y": 4.0, "a/x": 5.0})
    assert rows.to_host() == [(1, {"a/x": 1.0}), (3, {"a/x": 5.0, "a/y": 4.0})]
    assert rows.to_host() == []


def test_every_kind_of_value() -> None:
    rows = Rows()
    rows.add(
        0,
        {
            "a/int": 2,
            "a/low": torch.tensor(1.5, dtype=torch.bfloat16),
            "a/flag": torch.tensor(True),
            ("a/one", "a/two"): torch.tensor([1.0, 2.0]),
            "a/array": torch.ones(2, 3),
            "c/sharpness": Estimate(4.0, error=0.1, products=7, converged=True),
        },
    )
    ((_, row),) = rows.to_host()
    array = row.pop("a/array")
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 3)
    assert row["c/sharpness"] == 4.0
    assert row["c/sharpness.error"] == 0.1
    assert {name: row[name] for name in row if name.startswith("a/")} == {
        "a/int": 2.0, "a/low": 1.5, "a/flag": 1.0, "a/one": 1.0, "a/two": 2.0,
    }  # fmt: skip
    assert all(type(value) is float for value in row.values())


def test_a_value_is_what_it_was_when_it_was_added() -> None:
    rows = Rows()
    loss = torch.tensor(1.0, requires_grad=True)
    rows.add(0, {"train/loss": loss})
    with torch.no_grad():
        loss.fill_(9.0)
    assert rows.to_host() == [(0, {"train/loss": 1.0})]
