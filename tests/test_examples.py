"""Each example runs and ends in a report; the README's lines run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dyndiag

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_ends_in_a_report(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.strip().splitlines()[-1])
    assert report.stat().st_size > 50_000
    run = dyndiag.Run(report.parent)
    assert {"train/loss", "gradients/norm", "curvature/sharpness"} <= set(run.names)


def test_the_readmes_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fences = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = (fence for fence in fences if "monitor.step" in fence)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)

    def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    loader = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(20)]
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": loss_fn,
        "loader": loader,
    }
    monkeypatch.chdir(tmp_path)
    exec(lines, names)
    assert (tmp_path / "runs" / "first" / "report.html").exists()
