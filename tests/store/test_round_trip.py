"""What is written comes back as itself."""

from __future__ import annotations

import math
import sqlite3
import struct
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndiag.store import Run, Writer
from dyndiag.values import Event

NAMES = ["train/loss", "train/LOSS", "curvature/sharpness", "curvature/step", "events/a", "A/b.c"]
values = st.dictionaries(st.sampled_from(NAMES), st.floats(), min_size=1)
histories = st.lists(st.lists(st.tuples(st.integers(0, 30), values), max_size=5), max_size=5)


def bits(value: float) -> bytes:
    """The value with its sign of zero; every NaN is one NaN."""
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


@settings(max_examples=60)
@given(histories)
def test_every_float_comes_back_with_its_sign_and_absent_stays_absent(
    history: list[list[tuple[int, dict[str, float]]]],
) -> None:
    expected: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with closing(Writer(Path(folder))) as writer:
            for rows in history:
                writer.write(rows)
                for step, row in rows:
                    expected[step] = expected.get(step, {}) | row
        run = Run(folder)
        found = dict(run.rows())
        assert list(found) == sorted(expected)
        assert {step: {name: bits(row[name]) for name in row} for step, row in found.items()} == {
            step: {name: bits(row[name]) for name in row} for step, row in expected.items()
        }
        at_once = {name: (steps, column) for name, steps, column in run.columns()}
        assert list(at_once) == run.names
        for name, (steps, column) in at_once.items():
            alone = run[name]
            assert [*steps] == [*alone.index] == sorted(k for k in expected if name in expected[k])
            assert [*map(bits, column)] == [*map(bits, alone)]
        for name in run.names:
            series = {step: row[name] for step, row in sorted(expected.items()) if name in row}
            assert list(run[name].index) == list(series)
            assert [bits(value) for value in run[name]] == [bits(v) for v in series.values()]
        assert run.last_step == max(expected, default=None)


def test_a_series_is_float64_indexed_by_step(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(0, {"train/loss": 1.0}), (2, {"train/loss": math.nan, "train/skipped": 1})])
    expected = pd.Series([1.0, math.nan], index=pd.Index([0, 2], name="step"), name="train/loss")
    pd.testing.assert_series_equal(Run(tmp_path)["train/loss"], expected)


def test_numpy_scalars_and_integers_are_numbers(tmp_path: Path) -> None:
    row = {"a/b": np.float32(0.1), "a/c": np.int64(3), "a/d": True}
    with closing(Writer(tmp_path)) as writer:
        writer.write([(np.int64(5), row)])  # type: ignore[list-item]
    assert dict(Run(tmp_path).rows()) == {5: {"a/b": float(np.float32(0.1)), "a/c": 3.0, "a/d": 1}}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
        np.array([[-0.0, math.nan], [math.inf, -math.inf]]),
        np.array(7, dtype=np.int64),
        np.zeros((0, 3), dtype=np.float16),
        np.array([1, 2], dtype=">u4"),
        np.array([1j, 2]),
        np.array([True, False]),
    ],
)
def test_an_array_comes_back_with_its_shape_and_type(
    tmp_path: Path, array: np.ndarray[Any, Any]
) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([(4, {"curvature/density": array, "train/loss": 1.0})])
        writer.write([(9, {"curvature/density": np.zeros(1)})])
    run = Run(tmp_path)
    found = run.arrays("curvature/density")
    assert list(found) == [4, 9]
    assert found[4].dtype == array.dtype
    assert found[4].shape == array.shape
    assert found[4].tobytes() == array.tobytes()
    found[4][...] = 0  # the caller's own
    assert run.array_names == ["curvature/density"]
    assert run.names == ["train/loss"]


def test_an_array_of_objects_is_refused_and_nothing_of_the_write_is_kept(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        with pytest.raises(ValueError, match="a/b must be an array of numbers; one of object"):
            writer.write([(0, {"a/c": 1.0}), (1, {"a/b": np.array([{}])})])
        writer.write([(0, {"a/c": 2.0})])
    assert dict(Run(tmp_path).rows()) == {0: {"a/c": 2.0}}


def event(kind: str, start: int, **changes: Any) -> Event:
    return Event(kind=kind, start=start, peak=changes.pop("peak", start), **changes)


def test_events_come_back_sorted_and_a_later_one_replaces_its_namesake(tmp_path: Path) -> None:
    odd = {"factor": math.inf, "loss": math.nan, "drop": -0.0, "rule": "known", "text": "nan"}
    open_ = event("loss_spike", 7, severity=3.5, series=("train/loss", "gradients/norm"))
    closed = event("loss_spike", 7, peak=8, end=11, severity=9.0, series=open_.series, details=odd)
    other = event("divergence", 7, severity=math.nan, confidence=0.5)
    first = event("stability_gap", 2, end=2, series=('continual/accuracy/a "b"\udc00',))
    with closing(Writer(tmp_path)) as writer:
        writer.write([], [open_, other])
        assert Run(tmp_path).event_list()[1] == open_
        writer.write([(0, {"a/b": 1.0})], [closed, first])
    run = Run(tmp_path)
    found = run.event_list()
    assert [one.name for one in found] == [first.name, other.name, closed.name]
    assert repr(found) == repr([first, other, closed])  # repr: a NaN is not equal to itself


def test_replaced_events_are_the_only_ones(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write([], [event("a", 1), event("b", 2)])
        writer.replace_events([event("b", 2, end=5)])
    assert Run(tmp_path).event_list() == [event("b", 2, end=5)]


def test_the_events_table_says_missing_while_an_event_is_open(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        nothing = Run(tmp_path).events
        writer.write([], [event("a", 1, series=("x/y",), details={"z": 1.5}), event("b", 2, end=3)])
    events = Run(tmp_path).events
    columns = ["kind", "start", "peak", "end", "severity", "confidence", "series", "details"]
    assert list(events.columns) == list(nothing.columns) == columns
    assert (events.dtypes == nothing.dtypes).all()
    assert str(events["end"].dtype) == "Int64"
    assert events["end"][0] is pd.NA
    assert events["end"][1] == 3
    assert events["series"][0] == ("x/y",)
    assert events["details"][0] == {"z": 1.5}


def test_metadata_merges_by_key_and_keeps_what_json_cannot(tmp_path: Path) -> None:
    with closing(Writer(tmp_path)) as writer:
        writer.write_metadata({"seed": 1, "optimizer": {"lr": np.float32(0.5), "betas": (0.9, 1)}})
        writer.write_metadata({"seed": 2, "best": [math.inf, -math.inf], "name": "nan\udc00é"})
        with pytest.raises(ValueError, match="must be JSON"):
            writer.write_metadata({"seed": 3, "model": object()})
    metadata = Run(tmp_path).metadata
    assert metadata == {
        "seed": 2,
        "optimizer": {"lr": 0.5, "betas": [0.9, 1]},
        "best": [math.inf, -math.inf],
        "name": "nan\udc00é",
    }
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:  # and SQL can read it as JSON
        query = "SELECT json_extract(value, '$[1].float') FROM metadata WHERE key = 'best'"
        assert db.execute(query).fetchone() == ("-inf",)


def test_rows_are_merged_over_tables_and_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.store.reader._PAGE", 6)
    rows = [
        (
            step,
            {
                f"{area}/x": float(step)
                for area, every in (("a", 1), ("b", 3), ("c", 7))
                if step % every == 0
            },
        )
        for step in range(40)
    ]
    with closing(Writer(tmp_path)) as writer:
        writer.write(rows)
        walk = Run(tmp_path).rows()
        assert next(walk) == rows[0]
        writer.write([(40, {"a/x": 1.0})])  # came after the walk began
    assert [rows[0], *walk] == rows
    steps = {name: list(at) for name, at, _ in Run(tmp_path).columns()}
    assert steps == {"a/x": [*range(41)], "b/x": [*range(0, 40, 3)], "c/x": [*range(0, 40, 7)]}
