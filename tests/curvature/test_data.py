"""How batches are cut, what the parts weigh, and which parameters are meant."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature.data import (
    chosen_parameters,
    cut,
    number_of_examples,
    pieces,
    read_once,
)
from dyndiag.errors import DyndiagError
from tests.oracles.networks import Attention, cnn, cross_entropy, mlp
from tests.oracles.spectra import seeded

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: Tensor
    name: str = "a"
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.x)


def rows(*sizes: int) -> Tensor:
    return torch.arange(float(np.prod(sizes))).view(sizes)


class TestCut:
    @given(n=st.integers(1, 20), examples=st.integers(1, 25))
    def test_together_the_parts_are_the_batch(self, n, examples):
        batch = {"x": rows(n, 3), "more": (rows(n), [rows(n, 2, 2)])}
        parts = cut(batch, examples)
        lengths = [len(part["x"]) for part in parts]
        assert lengths[:-1] == [examples] * (len(parts) - 1)
        assert sum(lengths) == n
        assert 0 < lengths[-1] <= examples
        for of in (lambda b: b["x"], lambda b: b["more"][0], lambda b: b["more"][1][0]):
            assert torch.equal(torch.cat([of(part) for part in parts]), of(batch))

    def test_a_batch_that_is_small_enough_is_itself(self):
        batch = (rows(4, 2), rows(4))
        assert cut(batch, 4)[0] is batch
        assert cut(batch, 9)[0] is batch

    def test_parts_are_views(self):
        x = rows(5, 2)
        assert cut(x, 2)[1].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()

    @pytest.mark.parametrize(
        "batch",
        [
            (rows(3, 2), rows(3)),
            [rows(3, 2), rows(3)],
            Pair(rows(3, 2), rows(3)),
            {"x": rows(3, 2)},
            OrderedDict(x=rows(3, 2)),
            Record(rows(3, 2)),
        ],
        ids=lambda batch: type(batch).__name__,
    )
    def test_types_stay(self, batch):
        first, second = cut(batch, 2)
        assert type(first) is type(second) is type(batch)
        assert number_of_examples(first) == 2
        assert number_of_examples(second) == 1

    def test_a_record_keeps_what_its_constructor_does_not_take(self):
        first, second = cut(Record(rows(3, 2), name="b"), 2)
        assert (first.name, second.name) == ("b", "b")
        assert torch.equal(torch.cat([first.twice, second.twice]), 2 * rows(3, 2))

    def test_a_mapping_that_cannot_change_becomes_a_dict(self):
        assert cut(MappingProxyType({"x": rows(3)}), 2)[1] == {"x": rows(3)[2:]}

    def test_encodings_of_hugging_face(self):
        transformers = pytest.importorskip("transformers")
        batch = transformers.BatchEncoding({"input_ids": rows(3, 5), "length": [1, 2, 3]})
        first, second = cut(batch, 2)
        assert type(first) is transformers.BatchEncoding
        assert first["input_ids"].shape == (2, 5)
        assert second.input_ids.shape == (1, 5)
        assert batch["input_ids"].shape == (3, 5)

    def test_what_is_no_tensor_of_the_batchs_length_goes_to_each_whole(self):
        shared = {
            "mask": torch.ones(5, 5),
            "temperature": torch.tensor(2.0),
            "none": None,
            "option": "greedy",
            "sizes": [7, 8, 9],
            "words": ["a", "b"],
            "kind": Record,
        }
        batch = {"temperature": shared["temperature"], "x": rows(3, 2), **shared}
        for part in cut(batch, 2):
            assert all(part[key] is value or part[key] == value for key, value in shared.items())

    def test_arrays_and_strings_of_the_batchs_length_are_cut(self):
        batch = (rows(3), np.arange(6).reshape(3, 2), ["a", "b", "c"], ("d", "e", "f"))
        first, second = cut(batch, 2)
        assert first[1].tolist() == [[0, 1], [2, 3]]
        assert (first[2], second[2], second[3]) == (["a", "b"], ["c"], ("f",))

    @pytest.mark.parametrize("examples", [0, -1, 2.0, None, "all", True])
    def test_how_many(self, examples):
        with pytest.raises(DyndiagError, match=r"number of examples, 1 or more, but it is "):
            cut(rows(4), examples)

    @pytest.mark.parametrize("batch", ["text", None, {"n": torch.tensor(3)}, []])
    def test_what_cannot_be_cut(self, batch):
        with pytest.raises(DyndiagError, match=r"does not show how many examples.*cannot be cut"):
            cut(batch, 2)


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = seeded(0)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def of_positive(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class TestPieces:
    @pytest.mark.parametrize("micro_batch", [None, 1, 3, 10])
    def test_they_weigh_by_their_examples(self, micro_batch):
        loader = DataLoader(TensorDataset(*data()), batch_size=7)
        found = pieces(mlp(), cross_entropy, loader, micro_batch=micro_batch)
        lengths = [len(batch[0]) for batch, _ in found]
        assert lengths == {None: [7, 3], 1: [1] * 10, 3: [3, 3, 1, 3], 10: [7, 3]}[micro_batch]
        assert [weight for _, weight in found] == pytest.approx([n / 10 for n in lengths])

    def test_reading_does_not_end_the_trainings_own_pass_over_the_loader(self):
        rows = TensorDataset(torch.arange(12.0))
        loader = DataLoader(rows, batch_size=4, num_workers=1, persistent_workers=True)
        seen = []
        for (batch,) in loader:
            seen += batch.tolist()
            assert len(read_once(mlp(), loader)) == 3
        assert seen == list(range(12))

    def test_sums_weigh_one(self):
        found = pieces(mlp(), summed, data(), micro_batch=4, reduction="sum")
        assert [weight for _, weight in found] == [1, 1, 1]

    def test_size_says_what_they_weigh_and_nothing_is_left_out(self):
        x, _ = data()
        y = torch.tensor([0, 0, 0, 1, 2, 1, 0, 1, 1, 1])

        def labels(batch: Any) -> int:
            return int((batch[1] > 0).sum())

        found = pieces(mlp(), of_positive, (x, y), micro_batch=3, size=labels)
        # The first three have no label, so their loss is 0/0, and weighs nothing.
        assert [round(6 * weight) for _, weight in found] == [3, 2, 1]
        with pytest.raises(DyndiagError, match="no example between them"):
            pieces(mlp(), of_positive, (x, 0 * y), micro_batch=3, size=labels)

    @pytest.mark.parametrize(
        ("loss_fn", "model"),
        [
            (of_positive, mlp()),
            (summed, mlp()),
            (lambda m, b: m(b[0]).var(), mlp()),
            (cross_entropy, nn.Sequential(mlp(), nn.BatchNorm1d(3).double()).train()),
            (of_positive, nn.Sequential(nn.Dropout(0.5), mlp()).train()),
            (
                cross_entropy,
                nn.Sequential(nn.Dropout(0.5), mlp(), nn.BatchNorm1d(3).double()).train(),
            ),
        ],
        ids=[
            "labels ignored",
            "sum",
            "examples coupled",
            "BatchNorm",
            "labels ignored, dropout",
            "BatchNorm, dropout",
        ],
    )
    def test_a_loss_that_is_no_mean_over_its_examples(self, loss_fn, model):
        with pytest.raises(DyndiagError, match=r"becomes [\d.]+, but it is [\d.]+: pass reduction"):
            pieces(model, loss_fn, data(), micro_batch=4)

    def test_dropout_masks_are_no_reason_to_refuse(self):
        model = nn.Sequential(nn.Dropout(0.5), mlp()).train()
        state = torch.get_rng_state()
        assert len(pieces(model, cross_entropy, data(), micro_batch=4)) == 3
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())

        def noisy(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch) + torch.randn(())

        assert len(pieces(model, noisy, data(), micro_batch=4)) == 3

        def in_train_mode_alone(model: nn.Module, batch: Any) -> Tensor:
            return {True: cross_entropy(model, batch)}[model.training]

        assert len(pieces(model, in_train_mode_alone, data(), micro_batch=4)) == 3

    def test_what_the_loss_lacks_is_said_by_what_differentiates_it(self):
        for loss_fn in (
            lambda m, b: m(b[0]),
            lambda m, b: cross_entropy(m, b) * float("nan"),
            lambda m, b: cross_entropy(m, b).item(),
        ):
            assert len(pieces(mlp(), loss_fn, data(), micro_batch=4)) == 3


class TestParameters:
    def test_all_that_require_gradients_in_model_order(self):
        model = cnn()
        model[1].bias.requires_grad_(False)
        found = chosen_parameters(model)
        assert list(found) == ["0.weight", "0.bias", "1.weight", "4.weight", "4.bias"]
        assert all(found[name] is p for name, p in model.named_parameters() if name in found)

    @pytest.mark.parametrize(
        ("asked", "names"),
        [
            (["4", "0.bias"], ["0.bias", "4.weight", "4.bias"]),
            ("1", ["1.weight", "1.bias"]),
            (["0.weight", "0", "0.weight"], ["0.weight", "0.bias"]),
            (("4.bias",), ["4.bias"]),
        ],
        ids=str,
    )
    def test_by_name(self, asked, names):
        assert list(chosen_parameters(cnn(), asked)) == names

    def test_by_themselves(self):
        model = cnn()
        assert list(chosen_parameters(model, model[4].parameters())) == ["4.weight", "4.bias"]
        assert list(chosen_parameters(model, [model[4].bias, "0.bias"])) == ["0.bias", "4.bias"]
        assert list(chosen_parameters(model, model[4].bias)) == ["4.bias"]
        model[4].bias.requires_grad_(False)
        assert list(chosen_parameters(model, model[4].parameters())) == ["4.weight"]

    def test_arguments_of_another_kind(self):
        with pytest.raises(
            DyndiagError, match=r"must be a torch\.nn\.Module, but it is a function"
        ):
            chosen_parameters(cross_entropy)
        with pytest.raises(DyndiagError, match=r"parameters themselves, but one is a int"):
            chosen_parameters(mlp(), 3)
        with pytest.raises(DyndiagError, match=r"loss_fn must be a function.*it is a NoneType"):
            pieces(mlp(), None, data())

    def test_a_name_is_no_prefix_of_another_module(self):
        model = nn.ModuleDict({"block": nn.Linear(1, 1), "block2": nn.Linear(1, 1)})
        assert list(chosen_parameters(model, "block")) == ["block.weight", "block.bias"]

    def test_tied_weights_come_once_and_go_by_any_name(self):
        model = Attention()
        names = list(chosen_parameters(model))
        assert names.count("embedding.weight") == 1
        assert "head.weight" not in names
        for asked in ("head", "embedding.weight", ["head.weight", "embedding"]):
            assert list(chosen_parameters(model, asked)) == ["embedding.weight"]

    def test_a_compiled_models_wrapper_does_not_show(self):
        assert list(chosen_parameters(torch.compile(mlp(), backend="eager"), "2")) == [
            "2.weight",
            "2.bias",
        ]

    @pytest.mark.parametrize(
        ("asked", "sentence"),
        [
            (["0", "5"], "no parameter or module '5' with parameters in it: the nearest is"),
            (["0.wieght"], "no parameter or module '0.wieght'.*the nearest is '0.weight'"),
            (["2"], "no parameter or module '2'"),
            ([""], "no parameter or module ''"),
            ([3], "names of parameters or modules, or parameters themselves, but one is a int"),
            ([], "no parameters were asked for"),
            ([nn.Parameter(torch.ones(2, 3))], r"shape \(2, 3\) is none of the model's"),
        ],
        ids=str,
    )
    def test_what_the_model_does_not_have(self, asked, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            chosen_parameters(cnn(), asked)

    def test_what_is_frozen(self):
        model = cnn()
        model[4].requires_grad_(False)
        with pytest.raises(DyndiagError, match="every parameter of '4' is frozen"):
            chosen_parameters(model, ["0", "4"])
        model.requires_grad_(False)
        with pytest.raises(DyndiagError, match="none of the parameters requires a gradient"):
            chosen_parameters(model)
        with pytest.raises(DyndiagError, match="none of the parameters requires a gradient"):
            chosen_parameters(model, model.parameters())

    def test_what_has_no_shape_yet(self):
        with pytest.raises(DyndiagError, match=r"0.weight has no shape yet: run the model"):
            chosen_parameters(nn.Sequential(nn.LazyLinear(3)))

    def test_what_is_complex(self):
        with pytest.raises(DyndiagError, match=r"weight is complex.*view_as_real"):
            chosen_parameters(nn.Linear(2, 2, dtype=torch.complex64))

    def test_what_is_on_two_devices(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        with pytest.raises(DyndiagError, match=r"0.weight is on cpu and 1.weight on meta"):
            chosen_parameters(model)
        assert list(chosen_parameters(model, "1")) == ["1.weight", "1.bias"]
