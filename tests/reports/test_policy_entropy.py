"""What the report says of a policy's entropy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyndiag.reports import contents, report, verdict
from dyndiag.reports.findings import Finding, findings
from dyndiag.store import Run
from tests.reports import made


def folder(tmp_path: Path, entropy: np.ndarray) -> Path:
    rows = [
        (i, {"train/loss": 1.0, "policy/entropy": float(h), "policy/kl_reference": i / 1000})
        for i, h in enumerate(entropy)
    ]
    return made.write(tmp_path / "run", rows)


def told(path: Path) -> tuple[Finding, str]:
    c = contents(Run(path))
    (one,) = findings(c).told
    return one, verdict(c)


def test_collapse(tmp_path: Path) -> None:
    path = folder(tmp_path, np.maximum(2 * np.exp(-np.arange(500) / 50), 0.08))
    one, said = told(path)
    assert one.event.kind == "entropy_collapse" and one.urgency == "look" and one.sure == "certain"
    assert one.title == "The policy's entropy fell to 4 % of its start and has not come back"
    assert said == one.title.replace("start and", "start from step 100 on, and") + "."
    assert one.reason == (
        "its trend led below a tenth of its start within 100 steps, and 380 samples lay below 0.18 "
        "nats."
    )
    assert [figure.title for figure in one.figures] == [
        "Policy entropy", "Distance from the reference",
    ]  # fmt: skip
    assert "Entropy collapse" in report(path).read_text("utf-8")


def test_a_warning_before_the_collapse(tmp_path: Path) -> None:
    one, said = told(folder(tmp_path, 2 * np.exp(-np.arange(420) / 200)))
    assert one.title == "The policy's entropy was on its way to a tenth of its start"
    assert one.sure == "tentative" and "it has not come to that." in one.reason
    assert said.startswith("From step 365 on the policy's entropy was falling towards a tenth")


@pytest.mark.parametrize(("back", "urgency"), [(False, "act"), (True, "look")])
def test_explosion(tmp_path: Path, back: bool, urgency: str) -> None:
    entropy = np.interp(np.arange(300), [0, 100, 200, 300], [1, 1, 4, 1 if back else 4])
    one, said = told(folder(tmp_path, entropy))
    assert one.event.kind == "entropy_explosion" and one.urgency == urgency
    came = "and came back" if back else "and has not come back"
    assert one.title == f"The policy's entropy rose to 4.0 times its start {came}"
    assert said == f"The policy's entropy rose to 4.0 times its start from step 134 on, {came}."
