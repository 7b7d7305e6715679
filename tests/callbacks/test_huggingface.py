"""The Hugging Face callback in the real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dyndiag

transformers = pytest.importorskip("transformers")

from dyndiag.callbacks.huggingface import DyndiagCallback  # noqa: E402

LENGTH = 12


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random tokens; labels of different lengths, the rest masked by -100."""

    def __init__(self, count: int = 64) -> None:
        g = torch.Generator().manual_seed(0)
        self.rows = torch.randint(31, (count, LENGTH), generator=g)
        self.visible = torch.randint(4, LENGTH + 1, (count,), generator=g)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        seen = torch.arange(LENGTH) < self.visible[i]
        return {
            "input_ids": self.rows[i],
            "attention_mask": seen.long(),
            "labels": self.rows[i].where(seen, -100),
        }


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def train(
    folder: Path, callbacks: list[Any], size: int = 8, accumulate: int = 1, **options: Any
) -> tuple[Any, list[dict[str, float]]]:
    settings = {
        "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5,
        "warmup_steps": 2, **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        seed=0,
        **settings,
    )
    trainer = transformers.Trainer(
        model=gpt2(), args=arguments, train_dataset=Tokens(), callbacks=callbacks
    )
    trainer.train()
    return trainer.model, [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(autouse=True)
def _quiet_and_seen_often(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.setattr("dyndiag.schedule.GRACE", 20.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    alone, logs = train(tmp_path, [], accumulate=accumulate)
    watched, logs_watched = train(
        tmp_path, [DyndiagCallback(run=tmp_path / "run")], accumulate=accumulate
    )
    for (name, one), other in zip(
        alone.state_dict().items(), watched.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert [log["loss"] for log in logs] == [log["loss"] for log in logs_watched]
    run = dyndiag.Run(tmp_path / "run")
    assert list(run["train/loss"].index) == list(range(6))
    assert len(run["curvature/sharpness"]) >= 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_rate_and_norm_are_the_trainers(tmp_path: Path, accumulate: int) -> None:
    _, logs = train(tmp_path, [DyndiagCallback(run=tmp_path / "run")], accumulate=accumulate)
    run = dyndiag.Run(tmp_path / "run")
    loss = [log["loss"] for log in logs]
    assert run["train/loss"].tolist() == pytest.approx(loss, abs=1e-3)  # the log rounds
    norms = [float(log["grad_norm"]) for log in logs]
    assert run["gradients/norm"].tolist() == pytest.approx(norms, rel=1e-3)
    clipped = [min(norm, 0.5) for norm in norms]
    assert run["gradients/norm_clipped"].tolist() == pytest.approx(clipped, rel=1e-3)
    rates = run["train/learning_rate"].tolist()
    assert rates[0] == 0.0
    assert rates[2] == pytest.approx(1e-2)
    assert "attention/logit_max_sampled/transformer.h.0.attn" in run.names
    assert run["logits/max"].notna().all()


def test_sharpness_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    for name, size, accumulate in (("whole", 8, 1), ("parts", 2, 4)):
        train(
            tmp_path,
            [DyndiagCallback(run=tmp_path / name)],
            size,
            accumulate,
            max_steps=2,
            warmup_steps=0,
            learning_rate=0.0,
        )
    whole, parts = (dyndiag.Run(tmp_path / name) for name in ("whole", "parts"))
    for name in ("curvature/sharpness", "gradients/norm"):
        # Dropout masks differ between the two cuts, so the gradient norms are only close.
        tolerance = 2e-2 if name == "curvature/sharpness" else 0.3
        assert parts[name].iloc[0] == pytest.approx(whole[name].iloc[0], rel=tolerance)


def test_a_second_training_goes_on_at_the_trainers_step(tmp_path: Path) -> None:
    callback = DyndiagCallback(run=tmp_path / "run")
    train(tmp_path, [callback])
    train(tmp_path, [callback])
    run = dyndiag.Run(tmp_path / "run")
    assert list(run["train/loss"].index) == list(range(6))  # the trainer began at 0 again
