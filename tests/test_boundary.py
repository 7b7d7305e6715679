"""What is caught, what is told, and where it points."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import dyndiag
from dyndiag.boundary import Boundary
from tests.models import batches, cross_entropy, mlp


@pytest.mark.filterwarnings("ignore:dyndiag")
def test_a_failure_is_counted_each_time_and_told_once() -> None:
    boundary = Boundary()
    for step in range(3):
        boundary.step = step
        with boundary("Sharpness"):
            raise ValueError("no luck")
    assert boundary.failures["Sharpness"] == 3
    assert boundary.failed() == ["Sharpness"] * 3
    assert boundary.failed() == []
    (notice,) = boundary.notices
    assert notice["step"] == 0
    assert "no luck" in notice["text"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_to_stop_the_program_does(error: type[BaseException]) -> None:
    with pytest.raises(error), Boundary()("Sharpness"):
        raise error


@pytest.mark.parametrize("told", [True, False], ids=["step is called", "only the optimizer"])
def test_a_warning_points_to_the_users_line(told: bool, tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.01)  # has no known threshold
    batch = batches("mlp", 1)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dyndiag.Monitor(
            model, optimizer, cross_entropy, run=tmp_path / "run", probe_batch=batch
        ) as monitor:
            for _ in range(12):
                loss = cross_entropy(model, batch)
                loss.backward()
                optimizer.step()
                if told:
                    monitor.step(loss=loss, batch=batch)
    (warning,) = caught
    assert "Rprop" in str(warning.message)
    assert Path(warning.filename).parent == Path(__file__).parent
