"""Batches of every shape: copied, measured, weighed."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from dyndiag.batches import (
    ForwardCall,
    MicroBatches,
    batch_size,
    copy_batch,
    own_loss,
    same_data,
    tensors,
)
from dyndiag.errors import DyndiagError
from tests.models import mlp

Pair = namedtuple("Pair", "x y")


@dataclass
class Example:
    x: Tensor
    y: Tensor
    name: str = "train"


class Encoding(UserDict[str, Tensor]):
    """A mapping whose items are attributes, as tokenizers return."""

    def __getattr__(self, name: str) -> Tensor:
        if name == "data" or name.startswith("__"):
            raise AttributeError(name)
        return self.data[name]


def x() -> Tensor:
    return torch.arange(6.0).reshape(3, 2)


def y() -> Tensor:
    return torch.arange(3)


SHAPES = {
    "tensor": lambda: x(),
    "tuple": lambda: (x(), y()),
    "nested": lambda: {"in": [{"x": x()}], "out": (y(), None, "text", 3)},
    "namedtuple": lambda: Pair(x(), y()),
    "dataclass": lambda: Example(x(), y()),
    "encoding": lambda: Encoding(x=x(), y=y()),
    "packed": lambda: pack_sequence([torch.rand(3, 2), torch.rand(2, 2)]),
    "micro-batches": lambda: MicroBatches(((x(), y()), (x(), y())), (0.25, 0.75)),
    "forward call": lambda: ForwardCall((x(),), {"labels": y()}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_copy_is_equal_of_the_same_type_and_shares_nothing(kind: str) -> None:
    batch = SHAPES[kind]()
    copied = copy_batch(batch)
    assert type(copied) is type(batch)
    assert len(list(tensors(batch))) == len(list(tensors(copied))) > 0
    assert same_data(batch, copied)
    for tensor in tensors(batch):
        tensor.add_(1)
    assert not same_data(batch, copied)
    assert not {t.data_ptr() for t in tensors(batch)} & {t.data_ptr() for t in tensors(copied)}


def test_a_copied_encoding_can_be_used_as_the_original() -> None:
    assert torch.equal(copy_batch(SHAPES["encoding"]()).x, x())


def test_a_copy_has_no_graph_but_requires_the_same_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    copied = copy_batch(Example(x() * weight, y()))
    assert copied.x.is_leaf
    assert copied.x.requires_grad
    assert not copied.y.requires_grad


def test_the_size_is_that_of_the_first_tensor_with_a_length() -> None:
    assert batch_size({"scale": torch.tensor(2.0), "x": x()}) == 3
    assert batch_size("text") == 1
    assert SHAPES["micro-batches"]().size == 6


def test_the_loss_is_the_weighted_sum() -> None:
    batch = MicroBatches((1.0, 2.0), (0.25, 0.75))
    loss = batch.loss(lambda model, b: torch.tensor(b), mlp())
    assert loss.item() == 0.25 + 1.5
    equal = MicroBatches((1.0, 2.0)).loss(lambda model, b: torch.tensor(b), mlp())
    assert equal.item() == 1.5


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (3.0, r"scalar tensor, but it is a float"),
        (torch.zeros(2), r"one number.*shape \(2,\)"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused_in_words(loss: Any, says: str) -> None:
    with pytest.raises(DyndiagError, match=says):
        MicroBatches((1,)).loss(lambda model, batch: loss, mlp())


def test_the_models_own_loss_gets_its_batch_as_the_model_takes_it() -> None:
    def model(a: Any, b: Any = 0.0) -> dict[str, Tensor]:
        return {"loss": torch.tensor(10.0 * a + b)}

    batches = [{"a": 1, "b": 2}, (1, 2), [1, 2], ForwardCall((1,), {"b": 2})]
    assert {own_loss(model, batch).item() for batch in batches} == {12.0}  # type: ignore[arg-type]
    assert own_loss(model, 1).item() == 10.0  # type: ignore[arg-type]
    with pytest.raises(DyndiagError, match=r"no \.loss.*loss_fn"):
        own_loss(mlp(), torch.zeros(1, 8))
