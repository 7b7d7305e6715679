"""One line in a Lightning Trainer.

python examples/lightning_trainer.py [FOLDER]        (needs dyndiag[lightning])
"""

import sys

import lightning
import torch
import torch.nn.functional as F

import dyndiag
from dyndiag.callbacks.lightning import DyndiagCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5)
        )

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"
torch.manual_seed(0)
inputs = torch.randn(256, 20)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(inputs, inputs[:, :5].argmax(dim=1)), batch_size=32
)
trainer = lightning.Trainer(
    max_epochs=5,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[DyndiagCallback(run=folder)],
)
trainer.fit(Classifier(), loader)

print(dyndiag.report(folder))
