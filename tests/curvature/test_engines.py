"""The right engine is chosen, says why, is checked once, and leaves no trace."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import hessian, loss_hessian
from dyndiag.curvature.engines.cached import double_backward
from dyndiag.errors import DyndiagError
from tests.oracles.networks import Attention, Recurrent, cross_entropy, mlp, next_token, tokens
from tests.oracles.networks import _data as data
from tests.oracles.networks import _drawn as drawn
from tests.oracles.spectra import dense, seeded

ENGINES = ["cached", "rebuilt", "forward_over_reverse", "linearised", "finite_differences"]

ALONE = [(engine, None) for engine in ENGINES if engine != "cached"]


def digits(n: int = 8) -> tuple[Tensor, Tensor]:
    return data(n, 6, classes=3)


def single(n: int = 8) -> tuple[Tensor, Tensor]:
    x, y = digits(n)
    return x.float(), y


def vector(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=seeded(9), dtype=torch.float64).to(dtype)


class Once(torch.autograd.Function):
    """Says that it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Detached(torch.autograd.Function):
    """A right gradient and a silently wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class ByHand(torch.autograd.Function):
    """As a kernel outside of torch: what its backward function does, autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(g.detach().numpy() * (1 - np.tanh(x) ** 2))


class Insists(torch.autograd.Function):
    """Raises where autograd would record its backward function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].double().numpy()
        return torch.from_numpy(g.double().numpy() * (1 - np.tanh(x) ** 2)).to(g.dtype)


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def with_kernel(function: type[torch.autograd.Function]) -> nn.Module:
    """`mlp()`, but its tanh is this one."""
    model = mlp()
    model[1] = Custom(function)
    return model


class TestChoice:
    def test_one_batch_keeps_its_graph(self):
        engine = hessian(mlp(), cross_entropy, digits()).engine
        assert engine.name == "cached"
        assert engine.reason == "one batch, so the graph of its gradient is kept"
        assert engine.check.outcome == "agrees"
        assert engine.check.difference < 1e-7
        assert engine.check.gradients == 4

    @pytest.mark.parametrize("any_size", [True, False])
    def test_the_check_takes_a_few_examples_where_it_can(self, any_size):
        seen: list[int] = []

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(len(batch[0]))
            assert any_size or len(batch[0]) == 40
            return cross_entropy(model, batch)

        engine = hessian(mlp(), loss_fn, digits(40)).engine
        assert engine.check.outcome == "agrees"
        assert seen == [40, 16, *4 * [16]] if any_size else seen == [40, 16, *4 * [40]]

    def test_a_missing_forward_derivative_is_no_end_of_the_process(self):
        x, _ = digits()
        with pytest.raises(DyndiagError, match=r"cannot multiply.*pass engine='auto'"):
            hessian(
                nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3)).double(),
                lambda model, batch: F.mse_loss(
                    model(batch), torch.zeros(1).double().expand(len(batch), 3)
                ),
                x,
                engine="linearised",
            )

    @pytest.mark.parametrize("data", ["loader", "micro-batches"])
    def test_several_batches_make_theirs_anew(self, data):
        batch = digits()
        options: dict[str, Any] = {"micro_batch": 3} if data == "micro-batches" else {}
        given = batch if options else DataLoader(TensorDataset(*batch), batch_size=3)
        operator = hessian(mlp(), cross_entropy, given, **options)
        assert operator.engine.name == "rebuilt"
        assert "several batches" in operator.engine.reason

    def test_the_probes_own_door_says_what_it_does(self):
        model = mlp()
        operator = loss_hessian(lambda: cross_entropy(model, digits()), list(model.parameters()))
        assert operator.engine.name == "cached"
        assert str(operator.engine.check) == "not checked against finite differences"

    @pytest.mark.parametrize(
        ("engine", "micro_batch"), [*((e, 3) for e in ENGINES if e != "linearised"), *ALONE]
    )
    def test_all_engines_give_one_operator(self, engine, micro_batch):
        model = mlp()
        whole = hessian(model, cross_entropy, digits())
        operator = hessian(model, cross_entropy, digits(), engine=engine, micro_batch=micro_batch)
        assert operator.engine.name == engine
        assert operator.engine.reason == "asked for"
        tolerance = 1e-8 if engine == "finite_differences" else 1e-14
        v = vector(operator.size)
        for _ in range(3):
            expected = whole.product(v)
            assert (operator.product(v) - expected).norm() < tolerance * expected.norm()
            v = expected
        torch.testing.assert_close(operator.gradient, whole.gradient, rtol=1e-12, atol=1e-15)
        assert operator.loss == pytest.approx(whole.loss, rel=1e-13)
        assert operator.parts == whole.parts

    def test_an_unknown_engine(self):
        with pytest.raises(DyndiagError, match=r"one of auto, cached, .*, not 'fast'"):
            hessian(mlp(), cross_entropy, digits(), engine="fast")

    def test_progress_is_shown(self, capsys):
        operator = hessian(mlp(), cross_entropy, digits(), micro_batch=4, progress=True)
        operator.product(vector(operator.size))
        assert "batches: " in capsys.readouterr().err

    def test_too_little_memory(self):
        def large(model: nn.Module, batch: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(DyndiagError, match=r"more memory than there is: pass micro_batch="):
            hessian(mlp(), large, digits())

    def test_the_users_own_error_is_left_alone(self):
        def wrong(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0][:, :5]), batch[1])

        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            hessian(mlp(), wrong, digits())

    def test_linearising_an_rnn(self):
        """Whose backward pass works in place: the second product must be as right as the first."""
        problem = Recurrent().double(), cross_entropy, data(3, 2, 2, classes=3)
        expected = hessian(*problem)
        operator = hessian(*problem, engine="linearised")
        v = vector(operator.size)
        for _ in range(3):
            torch.testing.assert_close(operator.product(v), expected.product(v))


class TestWithoutASecondDerivative:
    @pytest.mark.parametrize("kernel", [Once, Detached, ByHand, Insists])
    @pytest.mark.parametrize("batch", [digits(), single()], ids=["float64", "float32"])
    def test_differences_are_the_way_out(self, kernel, batch):
        dtype = batch[0].dtype
        operator = hessian(with_kernel(kernel).to(dtype), cross_entropy, batch)
        assert operator.engine.name == "finite_differences"
        assert operator.engine.check.outcome == "agrees"
        assert "not cached: " in operator.engine.reason
        assert "not forward_over_reverse: You must implement the jvp" in operator.engine.reason
        why = "Can't call numpy()" if kernel is Insists else "its products are wrong"
        assert why in operator.engine.reason
        v = vector(operator.size, dtype)
        expected = hessian(mlp(), cross_entropy, digits()).product(v.double())
        misfit = (operator.product(v).double() - expected).norm()
        assert misfit < (1e-8 if dtype == torch.float64 else 1e-3) * expected.norm()

    @pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
    def test_a_wrong_kernel_is_seen_at_any_scale_of_the_loss(self, scale):
        """Even where float32 holds no squares of its second derivatives."""

        def scaled(model: nn.Module, batch: Any) -> Tensor:
            return scale * cross_entropy(model, batch)

        x, y = digits()
        batch = x.float(), y
        operator = hessian(with_kernel(Detached).float(), scaled, batch)
        assert operator.engine.name == "finite_differences"
        assert operator.engine.check.outcome == "agrees"
        v = vector(operator.size, torch.float32)
        expected = hessian(mlp().float(), cross_entropy, batch).product(v)
        image = (operator.product(v).double() / scale).float()
        assert (image - expected).norm() < 1e-3 * expected.norm()
        right = hessian(mlp().float(), scaled, batch).engine
        assert (right.name, right.check.outcome) == ("cached", "agrees")

    def test_flash_attention_where_the_loss_insists_on_it(self):
        def flash(model: nn.Module, tokens: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return next_token(model, tokens)

        model = drawn(Attention().double(), 5)
        operator = hessian(model, flash, tokens())
        assert operator.engine.name == "finite_differences"
        assert "flash_attention_for_cpu_backward is not implemented" in operator.engine.reason
        v = vector(operator.size)
        expected = hessian(model, next_token, tokens()).product(v)
        assert (operator.product(v) - expected).norm() < 1e-7 * expected.norm()

    def test_a_kernel_of_torch_that_has_none(self):
        model = drawn(nn.Sequential(nn.EmbeddingBag(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), 1)
        operator = hessian(model, cross_entropy, (tokens(), torch.tensor([0, 1, 2, 0])))
        assert "_embedding_bag_backward' is not implemented" in operator.engine.reason
        matrix = dense(operator)
        assert (matrix - matrix.T).norm() < 1e-7 * matrix.norm()
        assert matrix.any()

    def test_an_engine_that_was_asked_for_raises_or_warns(self):
        with pytest.raises(DyndiagError, match=r"'cached' cannot multiply.*numpy.*engine='auto'"):
            hessian(with_kernel(Insists), cross_entropy, digits(), engine="cached")
        with pytest.warns(UserWarning, match=r"'cached' are wrong, by \d+\.\d%"):
            operator = hessian(with_kernel(Detached), cross_entropy, digits(), engine="cached")
        assert operator.engine.check.outcome == "disagrees"
        assert operator.engine.check.difference > 0.05
        assert operator.engine.check.spread < 1e-6


class TestCheck:
    def test_kinks_are_no_reason_to_distrust(self):
        """Differences of float32 gradients see the kinks, which no second derivative does; with
        2,000 examples they agree among themselves to some percent. In float64 the step is short."""
        x, y = data(2000, 6, classes=3)
        model = drawn(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)), 2)

        def of_all(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            assert len(batch[0]) == 2000  # of a few, the check would not see kinks
            return cross_entropy(model, batch)

        operator = hessian(model, of_all, (x.float(), y))
        assert operator.engine.name == "cached"
        assert operator.engine.check.outcome == "agrees"
        assert operator.engine.check.gradients == 9

    def test_kinks_in_differences_are_stated(self):
        """Where only float32 is to be had, differences across kinks are not within one percent."""

        def in_single(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            if model[0].weight.dtype is not torch.float32:
                raise RuntimeError("a kernel for float32 alone")
            return cross_entropy(model, batch)

        x, y = data(2000, 6, classes=3)
        model = drawn(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)), 2)
        rough = hessian(model, in_single, (x.float(), y), engine="finite_differences")
        finer = hessian(model, cross_entropy, (x.float(), y), engine="finite_differences")
        exact = hessian(model, cross_entropy, (x.float(), y))
        assert rough.engine.check.outcome == "inconclusive"
        assert finer.engine.check.outcome == "agrees"
        g = exact.gradient
        expected = exact.product(g)
        errors = [(h.product(g) - expected).norm() / expected.norm() for h in (rough, finer)]
        assert errors[0] < 10 * rough.engine.check.difference
        assert errors[1] < 1e-4 < 0.1 * errors[0]

    def test_noise_is_inconclusive(self):
        """A loss whose random numbers come from where no seed reaches has no one Hessian."""
        source = iter(range(10**6))

        def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(model, batch) * (1 + 0.1 * np.sin(next(source)))

        operator = hessian(mlp(), noisy, digits())
        assert operator.engine.name == "cached"
        assert operator.engine.check.outcome == "inconclusive"
        assert operator.engine.check.gradients == 8

    def test_it_is_made_once_for_each_model_engine_and_loss_function(self):
        calls: Counter[str] = Counter()

        def counting(name: str) -> Callable[[nn.Module, Any], Tensor]:
            def loss_fn(model: nn.Module, batch: Any) -> Tensor:
                calls[name] += 1
                return cross_entropy(model, batch)

            return loss_fn

        model = mlp()
        first = hessian(model, counting("first"), digits())
        again = hessian(model, counting("again"), digits())  # another object, the same code
        assert calls == {"first": 1 + 4, "again": 1}
        assert again.engine == first.engine
        hessian(model, counting("rebuilt"), digits(), engine="rebuilt")
        assert calls["rebuilt"] == 1 + 1 + 4
        hessian(model, lambda m, b: counting("another")(m, b), digits())
        assert calls["another"] == 5
        hessian(mlp(), counting("another model"), digits())
        assert calls["another model"] == 5

    def test_other_functions_in_the_same_code_are_checked_anew(self):
        """A loss made of its parts by one factory, or by functools.partial."""

        def composed(model: nn.Module, batch: Any, kernel: Callable[[Tensor], Tensor]) -> Tensor:
            return kernel(model(batch[0])).square().mean()

        def made(kernel: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
            return lambda model, batch: composed(model, batch, kernel)

        def partly(kernel: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
            return functools.partial(composed, kernel=kernel)

        for of in (made, partly):
            model = mlp()
            assert hessian(model, of(torch.square), digits()).engine.name == "cached"
            wrong = hessian(model, of(Detached.apply), digits()).engine
            assert wrong.name == "finite_differences"
            assert "its products are wrong" in wrong.reason
            assert hessian(model, of(torch.square), digits()).engine.name == "cached"

    def test_other_modules_are_checked_anew(self):
        model = mlp()
        assert hessian(model, cross_entropy, digits()).engine.name == "cached"
        model[1] = Custom(Detached)
        assert hessian(model, cross_entropy, digits()).engine.name == "finite_differences"

    def test_other_parameters_are_checked_anew(self):
        """Those behind the wrong kernel have the right second derivative."""
        model = with_kernel(Detached)
        last = list(model.parameters())[-1]
        assert hessian(model, cross_entropy, digits(), parameters=last).engine.name == "cached"
        assert hessian(model, cross_entropy, digits()).engine.name == "finite_differences"

    def test_it_remembers_what_failed(self):
        model = with_kernel(Detached)
        first = hessian(model, cross_entropy, digits())
        again = hessian(model, cross_entropy, digits())
        assert first.engine.name == again.engine.name == "finite_differences"
        assert first.engine.reason == again.engine.reason

    def test_a_loss_that_is_finite_only_nearby(self):
        """Differences may step out of its domain, which says nothing about the product."""

        def barrier(model: nn.Module, batch: Any) -> Tensor:
            return -torch.log(1e-9 - (model.weight - model.weight.detach().round()).square().sum())

        model = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, 2.0 + 2e-5]]))
        operator = hessian(model, barrier, None)
        assert operator.engine.name == "cached"
        assert dense(operator).isfinite().all()

    def test_it_does_not_keep_a_model_alive(self):
        import gc
        import weakref

        model = mlp()
        hessian(model, cross_entropy, digits())
        remains = weakref.ref(model)
        del model
        gc.collect()
        assert remains() is None

    def test_a_loss_linear_in_its_parameters(self):
        model = nn.Linear(6, 1).double()
        for engine in ("auto", "finite_differences"):
            operator = hessian(model, lambda m, b: m(b[0]).mean(), digits(), engine=engine)
            assert operator.engine.check.outcome in ("agrees", "inconclusive")
            assert operator.product(vector(operator.size)).norm() < 1e-6


class Careless(nn.Module):
    """Counts, draws, normalises, and does part of it again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.inner = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh())
        self.reentrant, self.calls, self.seen = reentrant, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        hidden = self.first(x)
        if self.reentrant is None:
            hidden = self.inner(hidden)
        else:
            hidden = checkpoint(self._counted, hidden, use_reentrant=self.reentrant)
        return self.last(hidden)

    def _counted(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def careless(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        random.random()
        np.random.rand()
        return cross_entropy(model, batch) + 0 * torch.rand(())


def snapshot(model: Careless) -> dict[str, Any]:
    """Everything that training could notice, as bytes or objects."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    _name, keys, *rest = np.random.get_state()
    return {
        "values": {
            k: t.detach().view(torch.uint8).clone().tolist() if t.dim() else t.item()
            for k, t in tensors.items()
        },
        "places": {k: (id(t), t.data_ptr(), t.dtype) for k, t in tensors.items()},
        "versions": {k: p._version for k, p in model.named_parameters()},
        "gradients": {k: (id(p.grad), p.grad.tolist()) for k, p in model.named_parameters()},
        "trained": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "counters": (model.calls, list(model.seen)),
        "streams": (random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()),
        "torch": (torch.autocast.__enter__, torch.utils.checkpoint.CheckpointFunction),
        "switches": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


class TestNoTrace:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "again", "reentrant"])
    @pytest.mark.parametrize("engine", ["auto", *ENGINES])
    def test_bit_for_bit(self, engine, reentrant, training):
        if engine == "linearised" and (training or reentrant is not None):
            pytest.skip("torch.func cannot trace it, as the next test sees")
        model = drawn(Careless(reentrant), 4).train(training)
        cross_entropy(model, single()).backward()
        torch.rand(3)
        before = snapshot(model)
        operator = hessian(model, careless, single(), engine=engine)
        assert snapshot(model) == before
        v = vector(operator.size, torch.float32)
        first = operator.product(v)
        assert snapshot(model) == before
        random.random(), np.random.rand(), torch.rand(2)
        assert torch.equal(operator.product(v), first)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("engine", ["linearised", "cached", "forward_over_reverse"])
    def test_nor_when_it_raises(self, engine, dtype):
        model = drawn(Careless(True), 4).train()
        model.inner.append(Custom(Insists))
        model.to(dtype)
        x, y = single()
        cross_entropy(model, (x.to(dtype), y)).backward()
        before = snapshot(model)
        with pytest.raises(DyndiagError, match="cannot multiply"):
            hessian(model, careless, (x.to(dtype), y), engine=engine)
        assert snapshot(model) == before

    def test_modules_that_the_loss_function_holds(self):
        teacher = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double().train()
        state = copy.deepcopy(teacher.state_dict())

        def distilled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.mse_loss(model(batch[0]), teacher(batch[0]).detach())

        operator = hessian(mlp(), distilled, digits(), engine="rebuilt")
        operator.product(vector(operator.size))
        assert all(torch.equal(t, state[k]) for k, t in teacher.state_dict().items())

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("change", ["step", "mode"])
    def test_a_model_that_moved_on_is_noticed(self, engine, change):
        if change == "mode" and engine in ("cached", "linearised"):
            pytest.skip("what it keeps is of the mode that it was built in")
        model = mlp()
        operator = hessian(model, cross_entropy, digits(), engine=engine)
        if change == "step":
            with torch.no_grad():
                model[0].bias.add_(1)
        else:
            model.train()
        with pytest.raises(DyndiagError, match=r"have changed since.*build it again"):
            operator.product(vector(operator.size))


class TestMicroBatches:
    def test_a_loss_that_is_no_mean_over_examples(self):
        def of_positive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)

        with pytest.raises(DyndiagError, match=r"cut into micro-batches, the loss .* becomes"):
            hessian(mlp(), of_positive, digits(), micro_batch=3)
        parts = hessian(
            mlp(), of_positive, digits(), micro_batch=3, size=lambda b: int((b[1] > 0).sum())
        )
        whole = hessian(mlp(), of_positive, digits())
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("insists", [False, True], ids=["copies", "own precision"])
    def test_weights_of_16_bits(self, insists):
        """The cut batches' loss is compared in the precision that it is computed in."""
        model = mlp().bfloat16()

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = batch[0].bfloat16() if insists else batch[0]
            return F.cross_entropy(model(x).float(), batch[1])

        x, y = digits()
        whole = hessian(model, loss_fn, (x.bfloat16(), y))
        parts = hessian(model, loss_fn, (x.bfloat16(), y), micro_batch=3)
        assert ("own 16 bits" in parts.engine.reason) == insists
        v = vector(whole.size, torch.float32)
        misfit = parts.product(v) - whole.product(v)
        assert misfit.norm() < (3e-2 if insists else 1e-5) * whole.product(v).norm()

    def test_batches_of_a_loader_are_cut(self):
        sizes: list[int] = []

        def seen(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            sizes.append(len(batch[0]))
            return cross_entropy(model, batch)

        loader = DataLoader(TensorDataset(*digits(10)), batch_size=6)
        parts = hessian(mlp(), seen, loader, micro_batch=4)
        sizes.clear()
        v = vector(parts.size)
        image = parts.product(v)
        assert sizes == [4, 2, 4]
        expected = hessian(mlp(), cross_entropy, digits(10)).product(v)
        torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-14)

    def test_a_product_needs_no_more_memory_than_a_training_step(self):
        """Bytes that autograd has saved at once: a quarter of a batch at a time is enough."""
        layers = [nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3)]
        model = drawn(nn.Sequential(*layers).double(), 1)
        batch = digits(240)
        step = most_saved(lambda: cross_entropy(model, batch).backward())
        product = hessian(model, cross_entropy, batch, micro_batch=60).product
        v = vector(sum(p.numel() for p in model.parameters()))
        assert most_saved(lambda: product(v)) < step
        whole = hessian(model, cross_entropy, batch, engine="rebuilt").product
        assert most_saved(lambda: whole(v)) > step  # so it is the cut that does it


def most_saved(run: Callable[[], object]) -> int:
    """The largest number of bytes in tensors that autograd holds for a backward pass, the
    weights' own apart."""
    import weakref

    held: Counter[int] = Counter()
    now = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            held[key] += 1
            now += size if held[key] == 1 else 0
            most = max(most, now)
            weakref.finalize(self, self.let_go, key, size)

        @staticmethod
        def let_go(key: int, size: int) -> None:
            nonlocal now
            held[key] -= 1
            now -= size if held[key] == 0 else 0

    def pack(tensor: Tensor) -> Any:
        return tensor if isinstance(tensor, nn.Parameter) or tensor.is_leaf else Kept(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: getattr(k, "tensor", k)):
        run()
    return most


class TestCost:
    def test_a_product_is_one_backward_pass_and_no_guard(self, monkeypatch):
        """After the first, which sees that nothing is run again in the backward pass."""
        import dyndiag.curvature.engines.loss as module

        guards: list[int] = []
        guard = module.no_trace
        monkeypatch.setattr(module, "no_trace", lambda *a, **k: guards.append(1) or guard(*a, **k))
        model = drawn(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)), 0).train()
        operator = hessian(model, cross_entropy, single())
        v = vector(operator.size, torch.float32)
        operator.product(v)
        guards.clear()
        operator.product(v)
        assert not guards
        again = drawn(Careless(False), 4).eval()
        operator = hessian(again, cross_entropy, single())
        v = vector(operator.size, torch.float32)
        operator.product(v)
        guards.clear()
        operator.product(v)
        assert guards

    def test_calls_of_the_loss_for_each_product(self):
        calls: list[int] = []

        def counted(model: nn.Module, batch: Any) -> Tensor:
            calls.append(1)
            return cross_entropy(model, batch)

        expected = {"cached": 0, "rebuilt": 1, "forward_over_reverse": 1, "linearised": 0,
                    "finite_differences": 2}  # fmt: skip
        for engine, number in expected.items():
            operator = hessian(mlp(), counted, digits(), engine=engine)
            calls.clear()
            operator.product(vector(operator.size))
            assert len(calls) == number, engine

    def test_double_backward_is_the_core_of_both(self):
        model = mlp()
        found = double_backward(lambda: cross_entropy(model, digits()), list(model.parameters()))
        operator = hessian(model, cross_entropy, digits())
        v = vector(operator.size)
        assert torch.equal(found.product(v), operator.product(v))
