"""One line in a Hugging Face Trainer.

python examples/huggingface_trainer.py [FOLDER]        (needs dyndiag[huggingface])
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import dyndiag
from dyndiag.callbacks.huggingface import DyndiagCallback

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/huggingface"
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )
)  # fmt: skip
rows = torch.arange(32).repeat(64, 1).add(torch.randint(32, (64, 1))).remainder(64)
arguments = TrainingArguments(
    output_dir=f"{folder}/checkpoints",
    max_steps=40,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    report_to=[],
    save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)
Trainer(
    model=model,
    args=arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    # Forty steps of a toy: a look at its curvature may take as long as the training.
    callbacks=[DyndiagCallback(run=f"{folder}/run", budget=1.0)],
).train()

print(dyndiag.report(f"{folder}/run"))
