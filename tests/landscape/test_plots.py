"""The pictures: what is on them, and that they need neither display nor pyplot."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndiag import landscape
from dyndiag.errors import DyndiagError
from dyndiag.landscape import progress
from tests.landscape.made import NOTHING, Weights, cross_entropy, double_well, network, task

PNG = b"\x89PNG\r\n\x1a\n"


def drawn(what: Any, *args: Any, **ask: Any) -> list[Any]:
    """The axes of the picture."""
    return list(landscape.plot(what, *args, **ask).axes)


def path(points: int = 25) -> landscape.LinearPath:
    return landscape.interpolate(
        Weights(0.0), Weights(-1.0), Weights(1.0), double_well, NOTHING, points=points
    )


def line(loss_fn: Any = double_well) -> landscape.Line:
    return landscape.line(
        Weights(1.0), loss_fn, NOTHING, along=torch.ones(1), between=(-2.0, 2.0), points=9
    )


def plane(loss_fn: Any = double_well, **ask: Any) -> landscape.Plane:
    return landscape.plane(Weights(1.0, 0.5), loss_fn, NOTHING, along=torch.eye(2), points=9, **ask)


def test_a_path_with_its_barrier(tmp_path: Path) -> None:
    [axes] = drawn(path(), tmp_path / "deep" / "path.png")
    assert (tmp_path / "deep" / "path.png").read_bytes().startswith(PNG)
    curve, chord = axes.lines[:2]
    assert curve.get_ydata().max() == 1.0 and not chord.get_ydata().any()
    [arrow] = axes.texts
    assert arrow.xy == (0.5, 1.0) and arrow.xyann == (0.5, 0.0)
    assert axes.get_ylabel() == "loss" and "α" in axes.get_xlabel()
    assert axes.get_legend().get_texts()[0].get_text() == "barrier 1"


def test_accuracy_has_an_axis_of_its_own() -> None:
    found = landscape.interpolate(
        network(0), network(0), network(1), cross_entropy, task(32), points=5
    )
    axes, right = drawn(found)
    assert right.get_ylabel() == "accuracy"
    assert found.accuracies is not None
    assert np.array_equal(right.lines[0].get_ydata(), found.accuracies)
    assert axes.get_ylabel() == "loss"


def test_several_over_each_other() -> None:
    [axes] = drawn([path(), path(5)], labels=["fine", "coarse"])
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["fine: barrier 1", "coarse: barrier 1"]
    [axes] = drawn([line(), line()], labels=["one", "two"])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert "direction 1" in axes.get_xlabel()


def test_what_is_not_finite_is_a_gap() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        t = model.t.sum()
        return torch.where(t > 1, torch.inf, t.log())

    found = line(loss_fn)
    [axes] = drawn(found)
    curve, marks = axes.lines[:2]
    finite = np.isfinite(found.losses)
    assert 0 < finite.sum() < 9
    assert np.array_equal(np.isfinite(curve.get_ydata()), finite)
    assert marks.get_xdata().tolist() == found.coordinates[~finite].tolist()
    axes = drawn(plane(loss_fn))[0]
    assert axes.get_title() == "grey: NaN or inf"
    with pytest.raises(DyndiagError, match="fewer than four losses"):
        landscape.plot(plane(lambda m, b: m.t.sum() * torch.nan))
    nowhere = drawn(line(lambda m, b: m.t.sum() * torch.nan))[0]
    assert len(nowhere.lines[1].get_xdata()) == 9


@pytest.mark.parametrize("pole, says", [(0.0, "inf"), (1.0, "nan")])
def test_a_path_that_is_not_finite_somewhere(pole: float, says: str) -> None:
    found = landscape.interpolate(
        Weights(0.0),
        Weights(-1.0),
        Weights(1.0),
        lambda m, _: 1 / (m.t.sum() - pole).abs(),
        NOTHING,
        points=5,
    )
    [axes] = drawn(found)
    assert not axes.texts  # no arrow to infinity
    assert axes.get_legend().get_texts()[0].get_text() == f"barrier {says}"


def test_a_plane_with_a_trajectory(tmp_path: Path) -> None:
    track = [Weights(0.0, 0.0), Weights(0.5, 1.0), Weights(1.0, 0.5)]
    found = plane(trajectory=track)
    axes, bar = drawn(found, tmp_path / "plane.png")
    track_drawn, star = axes.lines
    assert found.trajectory is not None
    assert np.array_equal(np.stack(track_drawn.get_data(), 1), found.trajectory)
    assert star.get_marker() == "*" and np.ravel(star.get_data()).tolist() == [0, 0]
    assert bar.get_ylabel() == "loss"
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["direction 1", "direction 2"]
    assert axes.get_aspect() == 1.0


def test_losses_over_decades_are_on_a_logarithmic_scale() -> None:
    def steep(model: Any, batch: Any) -> Tensor:
        return (3 * model.t.sum()).exp()

    assert drawn(line(steep))[0].get_yscale() == "log"
    assert drawn(line())[0].get_yscale() == "linear"
    ticks = drawn(plane(steep))[1].get_yticks()
    assert ticks[1] / ticks[0] == pytest.approx(ticks[2] / ticks[1])
    flat = drawn(plane(lambda m, b: 0 * m.t.sum() + 2))[1]
    assert flat.get_yticks()[0] == 1.5  # a plain has a picture, too


def test_what_cannot_be_drawn_is_said() -> None:
    for what in ([], [line(), path()], [plane(), plane()], 3):
        with pytest.raises(DyndiagError, match="plot takes a Plane, one or more Lines"):
            landscape.plot(what)  # type: ignore[arg-type]
    with pytest.raises(DyndiagError, match="each of the 1, but 2 came"):
        landscape.plot(line(), labels=["a", "b"])


def test_neither_matplotlib_nor_tqdm_comes_with_it() -> None:
    """Imported where they are used, so nobody else waits for them."""
    for file in Path(landscape.__file__).parent.glob("*.py"):
        code = ast.parse(file.read_text())
        names = {n.module for n in code.body if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in code.body if isinstance(n, ast.Import) for a in n.names}
        roots = {str(name).partition(".")[0] for name in names}
        assert not roots & {"matplotlib", "tqdm", "safetensors"}, file


def test_a_bar_on_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plane()
    assert capsys.readouterr().err == ""  # quick
    monkeypatch.setattr(progress, "_SECONDS", 1e-9)
    monkeypatch.setattr(progress, "_REFRESH", 0.0)
    plane()
    assert "plane: 100%" in capsys.readouterr().err
    landscape.ascent_sharpness(Weights(1.0), double_well, NOTHING)
    assert "ascent: 100%" in capsys.readouterr().err
    plane(progress=False)
    assert capsys.readouterr().err == ""
