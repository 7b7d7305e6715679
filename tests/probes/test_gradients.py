"""Gradient norms where a loss scaler or an unusual dtype is in play."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import batches, cross_entropy, mlp
from tests.probes.test_step import Watched


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_loss_scale_is_divided_out(clip: float | None) -> None:
    torch.manual_seed(0)
    w = Watched(model := mlp(), optimizer := torch.optim.AdamW(model.parameters(), lr=1e-3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = cross_entropy(model, batches("mlp", 1)[0])
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    row = w.row()
    norm = nn.utils.get_total_norm(expected).item()
    assert norm > 0.2  # so that clipping has something to do
    assert row["gradients/norm"] == pytest.approx(norm, rel=1e-4)
    if clip is not None:
        assert row["gradients/norm_clipped"] == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_norms_in_every_dtype(dtype: torch.dtype) -> None:
    model = nn.ParameterList([torch.ones(3, dtype=dtype), torch.ones(1, dtype=dtype)])
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scale = 2j if dtype.is_complex else 2
    ((model[0] * scale).sum() + model[1].sum()).abs().backward()
    w.optimizer.step()
    parts = [torch.linalg.vector_norm(p.grad.to(torch.complex128)) for p in model]
    expected = torch.stack(parts).norm().item()
    assert w.row()["gradients/norm"] == pytest.approx(expected, rel=1e-6)


def test_norms_of_float64_gradients_keep_their_precision() -> None:
    model = nn.ParameterList([torch.ones(1, dtype=torch.float64)])
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ((1 + 2.0**-40) * model[0]).sum().backward()
    w.optimizer.step()
    assert w.row()["gradients/norm"] == 1 + 2.0**-40
