"""Diagnose a Lightning run: `Trainer(callbacks=[DyndiagCallback(run="runs/x")])`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyndiag.batches import Batch, LossFunction, MicroBatches
from dyndiag.errors import DyndiagError
from dyndiag.monitor import Monitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "the Lightning callback needs one more package: pip install 'dyndiag[lightning]'"
    ) from missing


class DyndiagCallback(Callback):
    """Watches the trainer's module and its first optimizer from the first step to the last.

    The loss of a batch is what `training_step` returns for it, computed anew with logging off;
    under manual optimization, where that would train, pass `loss_fn(module, batch)`.
    `options` go to `Monitor`.
    """

    def __init__(
        self, run: str | Path, loss_fn: LossFunction | None = None, **options: Any
    ) -> None:
        self._run, self._loss_fn, self._options = run, loss_fn, options
        self._monitor: Monitor | None = None
        self._step = 0
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        self._step = trainer.global_step
        loss_fn = self._loss_fn
        if loss_fn is None and pl_module.automatic_optimization:
            loss_fn = training_step_loss
        self._monitor = Monitor(
            pl_module,
            trainer.optimizers[0],
            loss_fn,
            run=self._run,
            first_step=self._step,
            **self._options,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._monitor is None:
            return
        replayed = self._loss_fn is None
        self._batches.append({"batch": batch, "batch_idx": batch_idx} if replayed else batch)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            self._losses.append(outputs["loss"])  # already divided by accumulate_grad_batches
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            share = 1 / trainer.accumulate_grad_batches
            batches = MicroBatches(tuple(self._batches), (share,) * len(self._batches))
            loss = sum(self._losses[1:], start=self._losses[0]) if self._losses else None
            self._monitor.step(loss=loss, batch=batches)
            self._batches, self._losses = [], []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._monitor is not None:
            self._monitor.__exit__(type(exception), exception, exception.__traceback__)
            self._monitor = None

    @property
    def monitor(self) -> Monitor | None:
        """The run's monitor while it trains: for `record` and `start_task`."""
        return self._monitor

    def _close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


def training_step_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The loss that the module's `training_step` returns for a batch, with nothing logged."""
    training_step: Any = module.training_step
    arguments = [batch["batch"]]
    if _takes_index(training_step):
        arguments.append(batch["batch_idx"])
    with _logging_off(module):
        output = training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise DyndiagError(
            f"training_step returned {type(loss).__name__} instead of a loss, so there is no "
            "curvature of it: pass loss_fn(module, batch) -> scalar to the callback"
        )
    return loss


def _takes_index(training_step: Any) -> bool:
    """Whether Lightning hands it the batch's index: as a second argument, whatever its name."""
    kinds = [one.kind for one in inspect.signature(training_step).parameters.values()]
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    starred = inspect.Parameter.VAR_POSITIONAL in kinds
    return starred or sum(kind in places for kind in kinds) > 1


@contextmanager
def _logging_off(module: nn.Module) -> Iterator[None]:
    # Logged again, a batch would count twice in the epoch's metrics.
    attributes = vars(module)
    try:
        attributes["log"] = attributes["log_dict"] = lambda *args, **kwargs: None
        yield
    finally:
        attributes.pop("log", None)
        attributes.pop("log_dict", None)
