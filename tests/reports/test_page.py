from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dyndiag.errors import DyndiagError
from dyndiag.reports import contents, figures, page, report
from dyndiag.reports.contents import Density
from dyndiag.store import Run, Writer
from tests.reports import made


class Reader(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1][0] if self.tags else ""
        if self.cdata_elem and tag in self.inside:
            self.inside[tag][-1] += data

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.inside["script"][0])
        return found


def series(data: dict[str, Any], name: str, key: str = "v") -> np.ndarray:
    return np.frombuffer(base64.b64decode(data["series"][name][key]), "<f4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("runs") / "edge", made.edge())


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return report(folder).read_text("utf-8")


def test_writes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    assert report(folder) == folder / "report.html"
    other = report(str(folder), tmp_path / "sub" / "other.html")
    assert other == tmp_path / "sub" / "other.html" and other.stat().st_size > 50_000
    assert [p.name for p in other.parent.iterdir()] == ["other.html"]


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(DyndiagError, match="not a run"):
        report(tmp_path / "nowhere")


def test_the_policy_allows_its_own_script_and_style_only(html: str) -> None:
    reader = Reader(html)
    policy = next(a["content"] for t, a in reader.tags if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    for part, text in (
        ("script-src", reader.inside["script"][1]),
        ("style-src", reader.inside["style"][0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}'" in policy
    assert len(reader.inside["script"]) == 2 and len(reader.inside["style"]) == 1


def test_nothing_inline_and_nothing_loaded(html: str) -> None:
    for tag, attributes in Reader(html).tags:
        assert "style" not in attributes and "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if attributes.get("href", "").startswith("http"):  # type: ignore[union-attr]
            assert tag == "a"  # sources: followed by a click only
    assert "innerHTML" not in html and "eval(" not in html and "@import" not in html


def test_every_chapter_keeps_its_place(html: str) -> None:
    ids = [a["id"] for t, a in Reader(html).tags if t == "section"]
    assert ids == [
        "top", "findings", "stability", "spectrum", "gradients", "logits", "predictions",
        "continual", "others", "sure", "missing", "cost", "facts",
    ]  # fmt: skip
    assert "Accuracy by task: not measured.</b> No task was declared." in html
    assert "monitor.start_task(&#34;B&#34;, eval_batches=batches)" in html


def test_charts_hold_the_runs_numbers(html: str, folder: Path) -> None:
    data, run = Reader(html).data(), Run(folder)
    assert np.array_equal(
        series(data, "train/loss"), run["train/loss"].to_numpy().astype(np.float32)
    )
    sharp = run["curvature/sharpness"]
    assert np.array_equal(series(data, "curvature/sharpness"), sharp.to_numpy().astype("f4"))
    upper = run["curvature/sharpness.upper_bound"].to_numpy().astype("f4")
    assert np.array_equal(series(data, "curvature/sharpness", "hi"), upper)
    status = data["series"]["curvature/sharpness"]["status"]
    assert status == contents(run).estimates["curvature/sharpness"].status
    gaps = np.frombuffer(base64.b64decode(data["series"]["curvature/sharpness"]["u16"]), "<u2")
    assert np.cumsum(np.r_[0, gaps]).tolist() == sharp.index.tolist()


def test_each_figure_has_its_chart(html: str) -> None:
    reader = Reader(html)
    figures = [a["data-chart"] for t, a in reader.tags if t == "figure" and "data-chart" in a]
    charts = reader.data()["charts"]
    assert sorted(map(str, figures)) == sorted(charts)
    assert len(set(figures)) == len(figures)
    names = {m.get("series") for c in charts.values() for m in c["marks"]} - {None}
    assert names <= set(reader.data()["series"])


def test_density_is_mass(html: str) -> None:
    density = Reader(html).data()["density"]
    axis = np.arcsinh(np.array(density["grid"]) / density["c"]) / np.log(10)
    sample = density["samples"][0]
    assert np.trapezoid(sample["mean"], axis) == pytest.approx(1, rel=0.01)
    high = np.array(density["grid"]) > 2
    assert np.trapezoid(np.where(high, sample["mean"], 0), axis) == pytest.approx(0.05, rel=0.02)
    assert "10.0 % of the mass below zero" in sample["says"]


def test_density_without_nodes_is_the_kept_one(tmp_path: Path) -> None:
    grid = np.linspace(-1.0, 6.0, 701)
    mean = np.exp(-0.5 * ((grid - 0.2) / 0.1) ** 2) + 0.01 * np.exp(-((grid - 5) ** 2))
    rows = [(0, {"train/loss": 1.0, "curvature/density": np.stack([grid, mean, 0.2 * mean])})]
    c = contents(Run(made.write(tmp_path / "run", rows)))
    density = figures.density_data(c)
    assert density is not None
    axis = np.arcsinh(np.array(density["grid"]) / density["c"]) / np.log(10)
    mass = np.trapezoid(density["samples"][0]["mean"], axis)
    assert mass == pytest.approx(np.trapezoid(mean, grid), rel=0.02)


def test_probes_are_told_apart_by_the_order_of_their_nodes() -> None:
    empty = np.empty(0)
    nodes = np.array([-1.0, 0.0, 2.0, -0.5, 0.1, 3.0])
    weights = np.array([0.1, 0.3, 0.1, 0.2, 0.2, 0.1])
    two = Density(0, empty, empty, empty, nodes, weights)
    assert [part.tolist() for part, _ in figures.probes_of(two)] == [
        [-1.0, 0.0, 2.0],
        [-0.5, 0.1, 3.0],
    ]
    uneven = Density(0, empty, empty, empty, nodes, weights * np.array([2, 2, 2, 1, 1, 1]))
    assert figures.probes_of(uneven) == []


def test_hostile_strings_are_data(tmp_path: Path) -> None:
    bad = made.HOSTILE
    rows = [
        (
            i,
            {
                "train/loss": 1.0 + i,
                f"gradients/norm/{bad}": 1.0,
                "gradients/norm/</script><img src=x onerror=alert(1)>": 2.0,
                f"continual/accuracy/{bad}": 0.5,
                "continual/task": 0.0,
            },
        )
        for i in range(40)
    ]
    facts = {
        "command": "</script><script>alert(2)</script>",
        "model": {"class": bad, "parameters": 3},
        "tasks": [bad],
        "extra": {"a<b": ["</style>"]},
        "notices": [{"step": 3, "source": "<b>x</b>", "text": "</p><script>alert(3)</script>"}],
    }
    html = report(made.write(tmp_path / "run", rows, facts)).read_text("utf-8")
    reader = Reader(html)
    assert len(reader.inside["script"]) == 2
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert not {"<", ">", "&"} & set(reader.inside["script"][0])
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in html
    assert f"gradients/norm/:{bad}" in reader.data()["series"]  # as it was, inside the JSON


def test_long_texts_are_cut(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "run", made.spiked(50), {"command": "x" * 5000})
    html = report(folder).read_text("utf-8")
    assert "x" * 2000 + "… (5,000 characters)" in html and "x" * 2001 not in html


def test_a_training_that_broke_off_says_so(tmp_path: Path) -> None:
    notices = [{"step": 49, "source": "training", "text": "it ended with ValueError: <oops>"}]
    folder = made.write(tmp_path / "run", made.spiked(50), {"notices": notices})
    html = report(folder).read_text("utf-8")
    assert "ended 21 November 2026, 09:42 UTC · it ended with ValueError: &lt;oops&gt;</p>" in html
    notices[0]["text"] = "it ended with KeyboardInterrupt: "
    folder = made.write(tmp_path / "stopped", made.spiked(50), {"notices": notices})
    assert "it ended with KeyboardInterrupt</p>" in report(folder).read_text("utf-8")


def test_disagreement_is_on_the_page(tmp_path: Path) -> None:
    html = report(made.write(tmp_path / "run", made.spiked(), events=[])).read_text("utf-8")
    assert "gives other events than the run stored" in html
    assert "loss_spike from step 400" in html


def long_run(folder: Path, steps: int) -> Path:
    noise = np.random.default_rng(0).normal(size=(steps, 4))
    writer = Writer(folder)
    writer.write(
        [
            (
                i,
                {
                    "train/loss": 3 + 0.1 * row[0] + (20.0 if i == 31_234 else 0.0),
                    "gradients/norm": 1 + 0.1 * row[1] ** 2,
                    "updates/ratio": 0.1 + row[2] ** 2,
                    "logits/max": row[3],
                },
            )
            for i, row in enumerate(noise.tolist())
        ],
        [],
    )
    writer.close()
    return folder


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path: Path) -> None:
    file = report(long_run(tmp_path / "run", 60_000))
    html = file.read_text("utf-8")
    data = Reader(html).data()
    assert file.stat().st_size < 700_000
    assert max(len(json.dumps(one)) for one in data["series"].values()) < 105_000
    assert series(data, "train/loss").max() > 20
    assert "1 of 15 steps drawn, extremes kept" in html


def test_many_series_get_coarser_until_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = long_run(tmp_path / "run", 40_000)
    whole = report(folder).stat().st_size
    monkeypatch.setattr(page, "DATA_LIMIT", 100_000)
    small = report(folder)
    assert small.stat().st_size < whole - 100_000
    assert series(Reader(small.read_text("utf-8")).data(), "train/loss").max() > 20


def test_templates_are_package_data() -> None:
    assert {f"{name}.js" for name in page.SCRIPTS} == {
        p.name for p in (Path(page.__file__).parent / "templates" / "js").iterdir()
    }


def test_the_report_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from dyndiag.reports import report; "
        f"report({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_words_of_style_in_text(html: str) -> None:
    text = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)
    assert "\u00a0%" in text  # a number and its percent sign stay together
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).split()
