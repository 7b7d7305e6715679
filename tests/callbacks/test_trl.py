"""Policy signals out of TRL's GRPOTrainer, as the docstring of PolicySignals says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dyndiag
from dyndiag.probes.language.policies import PolicySignals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that TRL brings along
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    GRPOTrainer: Any = trl.GRPOTrainer

from dyndiag.callbacks.huggingface import DyndiagCallback

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "<eos>", *"abcdefgh"]


def tokenizer() -> Any:
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def saved_model(folder: Path) -> str:
    """On disk, from where TRL takes the reference policy as well."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return str(folder / "model")


def number_of_as(completions: list[str], **options: Any) -> list[float]:
    return [float(completion.split().count("a")) for completion in completions]


def train(folder: Path, watched: bool, **options: Any) -> Any:
    callback = DyndiagCallback(run=folder / "run", tensorboard=False)

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        signals = PolicySignals(clip_range=(0.2, 0.28))

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            self.per_token = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return self.per_token

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            log_probabilities, entropy, *_ = self.per_token
            if model.training:
                assert callback.monitor is not None
                callback.monitor.record(
                    self.signals(
                        step=self.state.global_step,
                        log_probabilities=log_probabilities,
                        entropy=entropy,
                        old_log_probabilities=inputs.get("old_per_token_logps"),
                        reference_log_probabilities=inputs.get("ref_per_token_logps"),
                        advantages=inputs["advantages"],
                        mask=inputs["completion_mask"],
                    )
                )
            return loss

    prompts = datasets.Dataset.from_dict({"prompt": ["b c", "d e f", "g", "h h"] * 8})
    settings = {"num_iterations": 2, "beta": 0.04, **options}
    trainer = (Trainer if watched else GRPOTrainer)(
        model=saved_model(folder),
        reward_funcs=number_of_as,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tokenizer(),
        callbacks=[callback] if watched else [],
        args=trl.GRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, seed=0, max_steps=4,
            per_device_train_batch_size=8, per_device_eval_batch_size=4, num_generations=4,
            epsilon=0.2, epsilon_high=0.28, max_completion_length=6,
            use_bias_correction_kl=False,  # else its mean of k3 is weighted by the ratio
            generation_kwargs={"min_new_tokens": 6},  # so that means of means are means
            learning_rate=0.03, lr_scheduler_type="constant", report_to=[], save_strategy="no",
            eval_strategy="steps", eval_steps=2, logging_steps=1, disable_tqdm=True, **settings,
        ),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_policy_signals_are_those_that_trl_logs(tmp_path: Path, accumulate: int) -> None:
    trainer = train(tmp_path, True, gradient_accumulation_steps=accumulate)
    run = dyndiag.Run(tmp_path / "run")
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    for name, key in (
        ("policy/entropy", "entropy"),
        ("policy/kl_reference", "kl"),
        ("policy/clip_share", "clip_ratio/region_mean"),
        ("policy/clip_share_low", "clip_ratio/low_mean"),
        ("policy/clip_share_high", "clip_ratio/high_mean"),
        ("gradients/norm", "grad_norm"),
    ):
        assert run[name].index.tolist() == [0, 1, 2, 3]  # evaluations are not among them
        assert run[name].tolist() == pytest.approx([log[key] for log in logs], abs=1e-4), name
    assert "train/loss" not in run.names  # the output has a .loss, but it is not GRPO's
    assert any("that is trained on" in notice["text"] for notice in run.metadata["notices"])
    ratios = run["policy/ratio_max"].tolist()  # every other step is the first on its samples
    assert ratios[::2] == pytest.approx([1.0, 1.0], abs=1e-5) and min(ratios[1::2]) > 1.1
    assert max(run["policy/clip_share"].tolist()) > 0


def test_one_step_on_each_sample_without_a_reference_and_no_trace(tmp_path: Path) -> None:
    ends = []
    for watched in (True, False):
        folder = tmp_path / str(watched)
        folder.mkdir()
        trainer = train(folder, watched, num_iterations=1, beta=0.0)
        ends.append([p.detach() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    names = dyndiag.Run(tmp_path / "True" / "run").names
    assert {n for n in names if n.startswith("policy/")} == {
        "policy/entropy",
        "policy/entropy_change",
    }
