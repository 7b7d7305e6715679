"""The Lightning callback in the real Trainer."""

from __future__ import annotations

import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyndiag

lightning = pytest.importorskip("lightning.pytorch")

from dyndiag.callbacks.lightning import DyndiagCallback, training_step_loss  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seen_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 20.0)


class Module(lightning.LightningModule):  # type: ignore[misc]
    """An MLP with dropout whose training_step logs, counts and calls a part of the module."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
        )
        self.kind = optimizer
        self.steps, self.losses = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.steps += 1
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(
    folder: Path, callbacks: list[Any], optimizer: str = "sgd", accumulate: int = 1
) -> tuple[Module, dict[str, float]]:
    module = Module(optimizer)
    g = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(96, 8, generator=g), torch.randint(4, (96,), generator=g)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=8
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # advice about workers and loggers
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        torch.manual_seed(1)
        trainer.fit(module, loader)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, optimizer: str, accumulate: int) -> None:
    alone, metrics = train(tmp_path, [], optimizer, accumulate)
    callback = DyndiagCallback(run=tmp_path / "run")
    watched, metrics_watched = train(tmp_path, [callback], optimizer, accumulate)
    for (name, one), other in zip(
        alone.state_dict().items(), watched.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert watched.losses == alone.losses
    assert watched.steps == alone.steps == 12
    assert metrics_watched == metrics  # replaying a step logs nothing
    run = dyndiag.Run(tmp_path / "run")
    steps = 12 // accumulate
    assert list(run["train/loss"].index) == list(range(steps))
    window = torch.tensor(alone.losses).view(steps, accumulate).mean(dim=1)
    assert run["train/loss"].tolist() == pytest.approx(window.tolist(), rel=1e-5)
    assert len(run["curvature/sharpness"]) >= 2
    assert run["train/learning_rate"].iloc[0] == (1e-2 if optimizer == "adamw" else 0.1)
    assert (run["gradients/norm_clipped"] <= 0.5 + 1e-6).all()
    assert (run["gradients/norm"] >= run["gradients/norm_clipped"] - 1e-6).all()
    assert len(run["gradients/norm"]) == steps
    assert "logits/max" in run.names
    assert len(run["curvature/batch_sharpness"]) >= 2


def test_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    norms = []

    class Reads(lightning.Callback):  # type: ignore[misc]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in module.parameters()]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    train(tmp_path, [DyndiagCallback(run=tmp_path / "run"), Reads()])
    run = dyndiag.Run(tmp_path / "run")
    assert run["gradients/norm"].tolist() == pytest.approx(norms, rel=1e-5)


def test_a_training_that_raises_leaves_a_whole_run(tmp_path: Path) -> None:
    class Fails(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, idx: int) -> None:
            if idx == 7:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, [DyndiagCallback(run=tmp_path / "run"), Fails()])
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["train/loss"]) == 7
    assert any("out of luck" in notice["text"] for notice in run.metadata["notices"])


@pytest.mark.parametrize(
    ("training_step", "handed"),
    [
        (lambda batch: (batch,), ("batch",)),
        (lambda batch, i: (batch, i), ("batch", 3)),  # Lightning hands the index by its place
        (lambda batch, *rest: (batch, *rest), ("batch", 3)),
        (lambda batch, *, scale=2: (batch, scale), ("batch", 2)),
    ],
)
def test_training_step_is_handed_what_lightning_hands_it(
    training_step: Any, handed: tuple[Any, ...]
) -> None:
    got: list[Any] = []

    @functools.wraps(training_step)
    def noted(*arguments: Any) -> Tensor:
        got.append(training_step(*arguments))
        return torch.zeros(())

    module = nn.Module()
    object.__setattr__(module, "training_step", noted)
    training_step_loss(module, {"batch": "batch", "batch_idx": 3})
    assert got == [handed]
