"""The monitor in a training loop of your own.

python examples/plain_loop.py [FOLDER]
"""

import sys

import torch
import torch.nn.functional as F

import dyndiag


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/plain"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
inputs = torch.randn(256, 20)
targets = inputs[:, :5].argmax(dim=1)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(inputs, targets), batch_size=64, shuffle=True
)

with dyndiag.Monitor(model, optimizer, loss_fn, run=folder) as monitor:
    for _ in range(50):
        for batch in loader:
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=batch)

print(dyndiag.report(folder))
