"""What `flush` acknowledged is there after SIGKILL, and the file is whole."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch

import dyndiag
from tests.models import batches, cross_entropy, mlp

KILLS = 50
BATCHES = batches("mlp", 4)


def train_until_killed(folder: Path, tell: int) -> None:
    """Train for ever, and tell the parent each step that a flush has acknowledged."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = dyndiag.Monitor(model, optimizer, cross_entropy, run=folder)
    step = 0
    while True:
        batch = BATCHES[step % 4]
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss=loss, batch=batch)
        step += 1
        if step % 3 == 0 and monitor.flush():
            os.write(tell, step.to_bytes(8, "little"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm parent to be quick")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.05)  # many steps in little time
    warm = tmp_path / "warm"
    model = mlp()
    with dyndiag.Monitor(model, torch.optim.SGD(model.parameters(), 0.1), run=warm) as monitor:
        monitor.step(loss=1.0)
    moments = random.Random(0)
    acknowledged_any = 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(hear)
                torch.set_num_threads(1)
                train_until_killed(folder, tell)
            finally:
                os._exit(1)
        os.close(tell)
        time.sleep(moments.uniform(0.1, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL  # it was still training
        with os.fdopen(hear, "rb") as pipe:
            told = pipe.read()
        if not told:
            continue
        acknowledged_any += 1
        steps = int.from_bytes(told[-8:], "little")
        with sqlite3.connect(folder / "run.db") as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        run = dyndiag.Run(folder)
        assert run["train/loss"].index.tolist()[:steps] == list(range(steps))
        assert len(run["gradients/norm"]) >= steps
        assert run.metadata["finished"] is None
    assert acknowledged_any >= KILLS // 2
