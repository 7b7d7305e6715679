"""Diagnose a Hugging Face run: `Trainer(..., callbacks=[DyndiagCallback(run="runs/x")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndiag.batches import LossFunction
from dyndiag.monitor import Monitor

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "the Hugging Face callback needs one more package: pip install 'dyndiag[huggingface]'"
    ) from missing


class DyndiagCallback(TrainerCallback):
    """Watches the trainer's own model and optimizer from its first step to its last.

    Batches and loss are read off the model's forward, so they are those of the step: all
    micro-batches of an accumulation, each with its share. `loss_fn(model, batch)` is needed only
    where the model's output has no `.loss` (a custom `compute_loss`). `options` go to `Monitor`.
    """

    def __init__(
        self, run: str | Path, loss_fn: LossFunction | None = None, **options: Any
    ) -> None:
        self._run, self._loss_fn, self._options = run, loss_fn, options
        self._monitor: Monitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._close()
        optimizer = kwargs["optimizer"]
        self._monitor = Monitor(
            kwargs["model"],
            getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
            self._loss_fn,
            run=self._run,
            first_step=state.global_step,
            **self._options,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._monitor is not None:
            self._monitor.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    @property
    def monitor(self) -> Monitor | None:
        """The run's monitor while it trains: for `record` and `start_task`."""
        return self._monitor

    def _close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
