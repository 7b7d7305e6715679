"""The probes of predictions in a monitored training: seen, and without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dyndiag
from dyndiag.probes import Probe
from dyndiag.probes.predictions.class_imbalance import ClassImbalance
from dyndiag.probes.predictions.opposing_signals import LossQuantiles, OpposingSignals
from dyndiag.probes.predictions.token_frequency import TokenFrequency
from dyndiag.schedule import Every
from tests.models import batches, cross_entropy, model_of
from tests.promises.test_leaves_no_trace import everything


def smoothed(model: Any, batch: Any) -> torch.Tensor:
    """Not a plain cross-entropy: examples are cut, and each has its own forward."""
    loss: torch.Tensor = cross_entropy(model, batch)
    return loss + 0.1 * model(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("kind", "loss_fn"),
    [("transformer", cross_entropy), ("transformer", smoothed), ("conv", smoothed)],
)
@pytest.mark.filterwarnings("ignore:dyndiag")  # of shares that are left out
def test_training_is_the_same_and_all_is_seen(
    kind: str, loss_fn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.2)  # the others' probes may wait

    def train(run: Path | None) -> dict[str, bytes]:
        torch.manual_seed(0)
        model = model_of(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = batches(kind, 3)
        probes: list[Probe] = [
            LossQuantiles(Every(3)),
            OpposingSignals(Every(3)),
            TokenFrequency(Every(3)),
        ]
        probes.append(ClassImbalance(Every(3)))
        monitor = run and dyndiag.Monitor(model, optimizer, loss_fn, run=run, probes=probes)
        for step in range(13):
            optimizer.zero_grad()
            loss = loss_fn(model, data[step % 3])
            loss.backward()
            optimizer.step()
            if monitor:
                monitor.step(loss=loss, batch=data[step % 3])
        if monitor:
            monitor.close()
        return everything(model, optimizer)

    assert train(tmp_path / "run") == train(None)
    run = dyndiag.Run(tmp_path / "run")
    ours = ("Predictions", "LossQuantiles", "OpposingSignals", "TokenFrequency", "ClassImbalance")
    notices = [notice["text"] for notice in run.metadata["notices"]]
    told = [text for text in notices if any(name in text for name in ours)]
    assert len(told) == (loss_fn is smoothed)
    assert all("leaves out the shares of the gradient" in text for text in told)
    buckets = [name for name in run.names if name.startswith("predictions/loss_by_frequency/")]
    assert len(buckets) >= 2
    for name in ("predictions/loss_quantile/50", "predictions/low_loss_share", *buckets):
        assert run[name].index.tolist() == [0, 3, 6, 9, 12]
    assert run["predictions/opposing_cosine"].index.tolist() == [3, 6, 9, 12]
    assert run["predictions/opposing_cosine"].abs().max() <= 1.0
    assert np.all(run["predictions/opposing_rise"] >= run["predictions/opposing_fall"])
    quantiles = [run[f"predictions/loss_quantile/{q}"].iloc[-1] for q in ("05", "50", "95")]
    assert quantiles == sorted(quantiles)
    for name in ("accuracy", "calibration_error", "confidence"):
        assert f"predictions/{name}" in run.names
