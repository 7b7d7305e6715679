"""What TensorBoard's own readers find in a run."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from dyndiag.errors import DyndiagError
from dyndiag.sinks import Sink, TensorBoard
from dyndiag.sinks.density import Axes, axes_for, draw
from dyndiag.values import Estimate, Event

ROOT = Path(__file__).parents[2]
LAYOUT = "custom_scalars__config__"

Values = Mapping[str, float | NDArray[Any]]


def show(folder: Path, *steps: tuple[int, Values] | tuple[int, Values, list[Event]]) -> None:
    sink = TensorBoard(folder)
    for step, values, *events in steps:
        sink.write(step, values, events[0] if events else [])
    sink.close()


class Shown:
    """A folder as TensorBoard reads it, nothing left out."""

    def __init__(self, folder: Path) -> None:
        everything = dict.fromkeys(("scalars", "text", "images", "custom_scalars"), 0)
        self._read = EventAccumulator(str(folder), tensor_size_guidance=everything)
        self._read.Reload()

    def tags(self) -> set[str]:
        return set(self._read.Tags()["tensors"])

    def series(self, tag: str) -> list[tuple[int, Any]]:
        """Step and value; of a scalar a float, of a text bytes, of an image its parts."""
        found = self._read.Tensors(tag)
        arrays = [(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in found]
        return [(step, array.item() if array.ndim == 0 else array) for step, array in arrays]


def single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_values_are_under_their_names(tmp_path: Path) -> None:
    rows = [
        (0, {"train/loss": 2.5, "gradients/norm/blocks.3.attn": 0.1}),
        (3, {"train/loss": -0.0}),
        (7, {"train/loss": 0.3, 'continual/accuracy/"a b" é': 1}),
    ]
    show(tmp_path, *rows)
    shown = Shown(tmp_path)
    assert shown.series("train/loss") == [(0, 2.5), (3, -0.0), (7, single(0.3))]
    assert shown.series("gradients/norm/blocks.3.attn") == [(0, single(0.1))]
    assert shown.series('continual/accuracy/"a b" é') == [(7, 1.0)]
    assert len(shown.tags()) == 4  # with the layout


def test_what_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    odd = [math.nan, math.inf, -math.inf, 1e300, -1e300]  # a single float ends at 3e38
    show(tmp_path, *((step, {"train/loss": value}) for step, value in enumerate(odd)))
    found = [value for _, value in Shown(tmp_path).series("train/loss")]
    assert str(found) == "[nan, inf, -inf, inf, -inf]"


def test_a_step_is_one_record(tmp_path: Path) -> None:
    show(tmp_path, *((step, {f"a/{part}": 1.0 for part in range(30)}) for step in range(5)))
    (file,) = tmp_path.iterdir()
    records = list(LegacyEventFileLoader(str(file)).Load())
    assert [len(one.summary.value) for one in records] == [0, 0, 1, 30, 30, 30, 30, 30]
    assert records[0].file_version == "brain.Event:2"


def test_only_a_trustworthy_estimate_is_in_the_main_tag(tmp_path: Path) -> None:
    name = "curvature/trace"
    show(
        tmp_path,
        (0, Estimate(1.0, error=0.1, products=9).columns(name)),
        (1, Estimate(2.0, converged=False).columns(name)),
        (2, Estimate(3.0, converged=False, provisional=True).columns(name)),
    )
    shown = Shown(tmp_path)
    assert shown.series(name) == [(0, 1.0), (2, 3.0)]
    assert shown.series(f"{name}/not_converged") == [(1, 2.0)]
    assert shown.tags() == {name, f"{name}/not_converged", LAYOUT}


def test_a_layer_called_error_is_a_series_of_its_own(tmp_path: Path) -> None:
    values = {
        "gradients/norm/a": 1.0,
        "gradients/norm/a.error": 2.0,
        "gradients/norm/a.products": 3.0,
    }
    show(tmp_path, (0, values))
    assert Shown(tmp_path).tags() == {*values, LAYOUT}


def test_sharpness_has_its_margin_at_each_step(tmp_path: Path) -> None:
    name = "curvature/sharpness"
    show(
        tmp_path,
        (0, Estimate(4.0, error=0.5, upper_bound=8.0).columns(name)),
        (1, Estimate(4.0, error=0.5, converged=False, provisional=True).columns(name)),
        (2, Estimate(4.0).columns(name)),
        (3, Estimate(4.0, converged=False).columns(name)),
        (4, Estimate(4.0, error=1.0, lower_bound=3.75).columns(name)),
    )
    shown = Shown(tmp_path)
    assert shown.series(f"{name}/lower") == [(0, 3.5), (1, 3.5), (2, 4.0), (4, 3.75)]
    assert shown.series(f"{name}/upper") == [(0, 8.0), (1, 4.5), (2, 4.0), (4, 5.0)]


def test_the_edge_is_drawn_with_each_edge_ratio(tmp_path: Path) -> None:
    edge = "stability/edge_ratio"
    show(
        tmp_path,
        (0, {"train/loss": 1.0}),
        (1, Estimate(0.9).columns(edge)),
        (2, Estimate(0.9, converged=False).columns(edge)),
        (3, Estimate(1.1).columns(edge)),
    )
    assert Shown(tmp_path).series("stability/edge") == [(1, 1.0), (3, 1.0)]


def page(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The layout: tags by category and chart."""
    (_, content) = Shown(folder).series(LAYOUT)[-1]
    return {
        category.title: {
            chart.title: list(chart.multiline.tag)
            or [tag for part in chart.margin.series for tag in (part.value, part.lower, part.upper)]
            for chart in category.chart
        }
        for category in layout_pb2.Layout.FromString(content).category
    }


def test_the_layout_is_written_once(tmp_path: Path) -> None:
    show(tmp_path, *((step, {"train/loss": 1.0}) for step in range(4)))
    assert [step for step, _ in Shown(tmp_path).series(LAYOUT)] == [0]
    found = page(tmp_path)
    assert list(found) == ["Stability", "Loss", "Warnings", "Layers", "Tasks"]
    assert found["Stability"] == {
        "sharpness and threshold": ["curvature/sharpness$", "stability/threshold$"],
        "edge ratio": ["stability/edge_ratio$", "stability/edge$"],
        "sharpness and how far it may be off": [
            "curvature/sharpness", "curvature/sharpness/lower", "curvature/sharpness/upper",
        ],
    }  # fmt: skip
    assert found["Tasks"] == {"accuracy by task": ["continual/accuracy/.+$"]}


def test_with_a_preconditioner_the_threshold_stands_beside_its_sharpness(tmp_path: Path) -> None:
    row = {"curvature/preconditioned_sharpness": 1.0}
    show(tmp_path, (5, {"train/loss": 1.0}), (6, row), (7, {"train/loss": 1.0}), (8, row))
    assert [step for step, _ in Shown(tmp_path).series(LAYOUT)] == [5, 6]
    stability = page(tmp_path)["Stability"]
    assert stability["preconditioned sharpness and threshold"] == [
        "curvature/preconditioned_sharpness$",
        "stability/threshold$",
    ]
    assert len(stability) == 4


def test_an_event_is_told_when_it_opens_peaks_and_ends(tmp_path: Path) -> None:
    event = Event("loss_spike", 10, 10, None, 6.5, 0.8, ("train/loss",), {"median": 0.1 + 0.2})
    peak = Event("loss_spike", 10, 12, None, 9.0, 0.8, ("train/loss",))
    longer = Event("loss_spike", 10, 12, None, 9.0, 0.9, ("train/loss",))
    ended = Event("loss_spike", 10, 12, 15, 9.0, 0.9, ("train/loss", "a|b/`<b>*x*"))
    steps: list[tuple[int, Values, list[Event]]] = [
        (10, {"train/loss": 1.0}, [event]),
        (12, {"train/loss": 1.0}, [peak]),
        (13, {"train/loss": 1.0}, [longer]),
        (15, {"train/loss": 1.0}, [ended]),
    ]
    show(tmp_path, *steps)
    found = Shown(tmp_path).series("events/loss_spike")
    assert [step for step, _ in found] == [10, 12, 15]
    first, last = found[0][1].decode(), found[-1][1].decode()
    for line in (
        "| what | loss spike |",
        "| when | from step 10, strongest at 10, still open |",
        "| severity | 6.5 |",
        "| confidence | 0.80 |",
        "| series | train/loss |",
        "| median | 0.3 |",
    ):
        assert line in first
    assert "from step 10, strongest at 12, until 15" in last
    assert r"train/loss, a\|b/\`\<b\>\*x\*" in last


def density(scale: float) -> NDArray[np.float64]:
    grid = np.linspace(-scale, 3 * scale, 200)
    mean = np.exp(-((grid / scale) ** 2)) / scale
    return np.stack([grid, mean, mean / 10])


def test_a_density_is_a_picture_on_axes_that_stay(tmp_path: Path) -> None:
    show(
        tmp_path,
        (0, {"curvature/density": density(1.0), "curvature/density_nodes": np.ones((2, 9))}),
        (1, {"curvature/density": density(1.0)}),
        (2, {"curvature/density": density(5.0)}),  # its own would be wider
    )
    shown = Shown(tmp_path)
    assert shown.tags() == {"curvature/density", LAYOUT}
    pictures = shown.series("curvature/density")
    assert [step for step, _ in pictures] == [0, 1, 2]
    first, same, wider = (
        np.asarray(Image.open(io.BytesIO(parts[2])).convert("RGB")) for _, parts in pictures
    )
    assert first.shape == (240, 320, 3)
    title, axis = slice(0, 22), slice(195, 240)
    assert (first[22:] == same[22:]).all()  # only the title's step differs
    assert (first[title] != same[title]).any()
    assert (first[axis] == wider[axis]).all()
    assert (first[30:180] != wider[30:180]).any()


@pytest.mark.parametrize("wrong", [math.nan, 0.0, -1.0])
def test_a_density_without_a_positive_number_is_drawn_all_the_same(wrong: float) -> None:
    flat = np.full((3, 5), wrong)
    assert draw(flat, axes_for(flat), "step 0")[:4] == b"\x89PNG"


def test_axes_are_whole_decades_with_one_to_spare() -> None:
    assert axes_for(density(1.0)) == Axes(reach=100.0, top=10.0)


def test_the_sink_takes_up_a_run_where_it_is_told_to(tmp_path: Path) -> None:
    show(tmp_path, *((step, {"train/loss": 1.0, "a/old": 1.0}) for step in range(10)))
    show(tmp_path, *((step, {"train/loss": 2.0}) for step in range(6, 9)))
    shown = Shown(tmp_path)
    loss = [(step, 1.0 if step < 6 else 2.0) for step in range(9)]
    assert shown.series("train/loss") == loss
    assert shown.series("a/old") == loss[:6]
    assert page(tmp_path)["Loss"]


def test_nothing_is_lost_at_flush_and_close(tmp_path: Path) -> None:
    sink: Sink = TensorBoard(tmp_path)
    sink.write(0, {"train/loss": 1.0}, [])
    sink.flush()
    assert Shown(tmp_path).series("train/loss") == [(0, 1.0)]
    sink.write(1, {"train/loss": 2.0}, [])
    sink.close()
    sink.close()
    assert Shown(tmp_path).series("train/loss") == [(0, 1.0), (1, 2.0)]


def test_a_full_disk_is_told_and_nothing_is_lost_once_there_is_room(tmp_path: Path) -> None:
    script = """
        import errno, resource, sys
        from pathlib import Path
        from dyndiag.sinks import TensorBoard, tensorboard

        def room(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def refused(action):
            try:
                action()
            except OSError as error:
                return error.errno == errno.EFBIG
            return False

        sink = TensorBoard(Path(sys.argv[1]))
        room(3000)
        for step in range(100):  # 90 bytes each
            sink.write(step, {"train/loss": 1.0, "gradients/norm": 2.0}, [])
        assert refused(sink.flush) and refused(sink.flush)
        sink.write(100, {"train/loss": 1.0}, [])
        room(5000)
        assert refused(sink.flush)
        tensorboard._MOST_WAITING = 1000
        assert refused(lambda: sink.write(101, {"train/loss": 1.0}, []))
        room(resource.RLIM_INFINITY)
        sink.write(102, {"train/loss": 1.0}, [])
        sink.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    steps = [step for step, _ in Shown(tmp_path).series("train/loss")]
    assert steps == [*range(101), 102]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DyndiagError, match=r"cannot be written into .*file"):
        TensorBoard(tmp_path / "file")


def test_neither_torch_nor_matplotlib_nor_tensorflow_comes_with_it() -> None:
    heavy = "{'torch', 'matplotlib', 'tensorflow', 'pandas'}"
    script = f"import sys, dyndiag.sinks, dyndiag.store; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "set()\n"
