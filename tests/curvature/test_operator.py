"""What operators make of each other, against the matrices they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor

from dyndiag.curvature import Operator, hessian, scaled
from dyndiag.curvature.operator import block_diagonal, deflated, shifted
from dyndiag.errors import DyndiagError
from dyndiag.optimizers.rule import TensorRule, UpdateRule, edge_operator, preconditioned_operator
from tests.oracles.networks import PROBLEMS, dense_hessian
from tests.oracles.spectra import counted, dense, matrix_with, of_matrix, seeded

MATRIX = matrix_with([-2.0, 0.5, 3.0, 7.0])
OTHER = matrix_with([1.0, 1.5, -4.0, 2.0], seed=1)
ONE = torch.eye(4, dtype=torch.float64)
NAMES = {"a.weight": slice(0, 2), "a.bias": slice(2, 3), "b.weight": slice(3, 4)}


def named(matrix: Tensor = MATRIX, parts: dict[str, slice] = NAMES) -> Operator:
    return replace(of_matrix(matrix), parts=parts)


class TestAlgebra:
    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (lambda a, b: -a, -MATRIX),
            (lambda a, b: a + b, MATRIX + OTHER),
            (lambda a, b: a - b, MATRIX - OTHER),
            (lambda a, b: 2.5 * a, 2.5 * MATRIX),
            (lambda a, b: a * -3, -3 * MATRIX),
            (lambda a, b: np.float32(0.5) * a, MATRIX / 2),
            (lambda a, b: np.float64(0.5) * a, MATRIX / 2),
            (lambda a, b: shifted(a, -1.5), MATRIX - 1.5 * ONE),
            (lambda a, b: 2.0 * (a - shifted(b, 1.0)) + a, 3 * MATRIX - 2 * OTHER - 2 * ONE),
        ],
    )
    def test_it_is_that_of_matrices(self, made, expected):
        found = made(named(), named(OTHER))
        torch.testing.assert_close(dense(found), expected, rtol=1e-14, atol=1e-14)
        assert found.parts == NAMES
        assert (found.size, found.dtype, found.device.type) == (4, torch.float64, "cpu")

    def test_it_multiplies_vectors(self):
        v = torch.arange(4, dtype=torch.float64)
        assert torch.equal(of_matrix(MATRIX) @ v, MATRIX @ v)

    def test_names_survive_an_operator_without(self):
        assert (of_matrix(OTHER) + named()).parts == NAMES
        assert (named() - of_matrix(OTHER)).parts == NAMES

    def test_a_product_costs_what_its_operands_cost(self):
        a, of_a = counted(of_matrix(MATRIX))
        b, of_b = counted(of_matrix(OTHER))
        ones = torch.ones(4).double()
        (-(2.0 * scaled(a + b, ones, ones)) - shifted(a, 1.0)).product(MATRIX[0])
        assert (len(of_a), len(of_b)) == (2, 1)

    @pytest.mark.parametrize(
        ("other", "sentence"),
        [
            (of_matrix(MATRIX[:3, :3]), "one has size 4 and the other 3"),
            (of_matrix(MATRIX, torch.float32), "dtype torch.float64 and the other torch.float32"),
            (replace(named(), device=torch.device("meta")), "device cpu and the other meta"),
            (named(parts={"b.weight": slice(0, 4)}), "same parameters in the same order"),
        ],
    )
    def test_only_operators_on_the_same_vectors_add_up(self, other, sentence):
        for combine in (Operator.__add__, Operator.__sub__):
            with pytest.raises(DyndiagError, match=sentence):
                combine(named(), other)

    def test_what_is_no_operand(self):
        for wrong in ("2", MATRIX, None):
            with pytest.raises(TypeError):
                wrong * of_matrix(MATRIX)  # type: ignore[operator]
            with pytest.raises(TypeError):
                of_matrix(MATRIX) + wrong  # type: ignore[operator]
        for number in (float("nan"), float("inf")):
            with pytest.raises(DyndiagError, match="finite numbers, not"):
                number * of_matrix(MATRIX)
            with pytest.raises(DyndiagError, match="finite numbers, not"):
                shifted(of_matrix(MATRIX), number)
        with pytest.raises(DyndiagError, match=r"shape \(4,\), torch.float64.*has shape \(3,\)"):
            of_matrix(MATRIX) @ torch.ones(3).double()


class TestScaling:
    def test_scaling_and_shift(self):
        root, shift = torch.rand(2, 4, generator=seeded(0), dtype=torch.float64)
        expected = root[:, None] * MATRIX * root
        found = scaled(named(), root)
        torch.testing.assert_close(dense(found), expected)
        assert found.parts == NAMES
        torch.testing.assert_close(
            dense(scaled(of_matrix(MATRIX), root, shift)), expected + torch.diag(shift)
        )

    def test_it_takes_vectors_like_its_own(self):
        with pytest.raises(DyndiagError, match="root must have shape"):
            scaled(of_matrix(MATRIX), torch.ones(4))
        with pytest.raises(DyndiagError, match=r"shift must have shape \(4,\).*has shape \(\)"):
            scaled(of_matrix(MATRIX), ONE[0], torch.tensor(1.0).double())

    def test_preconditioned_with_groups_and_decays(self):
        """A^½ (H + diag γ_c) A^½ + diag(ηγ_d), A = diag(ηΓ/P), of a network's Hessian."""
        problem = PROBLEMS["mlp, cross-entropy"]()
        trained = list(problem.model.parameters())
        generator = seeded(3)
        preconditioners = [
            0.1 + torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in trained
        ]
        groups = [(0.1, 1.0, 0.0, 0.3), (0.02, 1 / 19, 0.5, 0.0)]  # η, Γ, γ_c, γ_d
        rules = [
            TensorRule(rate, gain, p, coupled, decoupled)
            for p, (rate, gain, coupled, decoupled) in zip(
                preconditioners, [groups[0], groups[1], groups[1], groups[0]], strict=True
            )
        ]
        rule = UpdateRule(tuple(rules), tuple(p.numel() for p in trained))

        def flat(of: Callable[[TensorRule], Any]) -> Tensor:
            values = zip(map(of, rules), trained, strict=True)
            return torch.cat([(v * torch.ones_like(p)).detach().flatten() for v, p in values])

        matrix, p = dense_hessian(problem), flat(lambda r: r.preconditioner)
        step = (flat(lambda r: r.learning_rate * r.gain) / p).sqrt()
        expected = step[:, None] * (matrix + torch.diag(flat(lambda r: r.coupled_decay))) * step
        expected += torch.diag(flat(lambda r: r.learning_rate * r.decoupled_decay))
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        found = dense(edge_operator(operator, rule))
        # The dense Hessian comes from differences, to 1e-9; scaling magnifies that unevenly.
        assert (found - expected).abs().max() < 1e-7 * expected.abs().max()
        assert (found - found.T).abs().max() < 1e-14 * expected.abs().max()
        found = dense(preconditioned_operator(operator, rule))
        expected = matrix / (p[:, None] * p).sqrt()
        assert (found - expected).abs().max() < 1e-7 * expected.abs().max()


class TestDeflation:
    def test_exact_pairs_become_null_vectors_either_way(self):
        values, vectors = torch.linalg.eigh(MATRIX)
        known = vectors.T[2:]
        for found in (
            deflated(named(), known),
            deflated(named(), known, values[2:]),
            deflated(named(), known, values[2:].numpy()),
        ):
            torch.testing.assert_close(
                torch.linalg.eigvalsh(dense(found)), torch.tensor([-2, 0, 0, 0.5]).double()
            )
            assert found.parts == NAMES

    def test_any_directions_can_be_projected_away(self):
        rows = torch.linalg.qr(torch.randn(4, 2, generator=seeded(1)).double()).Q.T
        rest = ONE - rows.T @ rows
        torch.testing.assert_close(dense(deflated(named(), rows)), rest @ MATRIX @ rest)

    def test_with_values_what_was_taken_and_what_is_left_add_up(self):
        rows = torch.linalg.qr(torch.randn(4, 2, generator=seeded(1)).double()).Q.T
        values = torch.tensor([3.0, -1.0]).double()
        taken = rows.T @ torch.diag(values) @ rows
        torch.testing.assert_close(dense(deflated(named(), rows, values)) + taken, MATRIX)

    def test_a_product_costs_one(self):
        operator, calls = counted(of_matrix(MATRIX))
        deflated(operator, ONE[:2]).product(MATRIX[0])
        deflated(operator, ONE[:2], [1.0, 2.0]).product(MATRIX[0])
        assert len(calls) == 2

    @pytest.mark.parametrize(
        ("vectors", "values", "sentence"),
        [
            (ONE[0], None, r"rows, of shape \(k, 4\), but have shape \(4,\)"),
            (ONE[:0], None, r"rows, of shape \(k, 4\), but have shape \(0, 4\)"),
            (ONE[:2, :3], None, r"each of the vectors must have shape \(4,\).*has shape \(3,\)"),
            (ONE[:2].float(), None, "each of the vectors must.*torch.float32"),
            (2 * ONE[:2], None, r"orthonormal rows, but.*off by 3.*torch.linalg.qr"),
            (MATRIX * float("nan"), None, "orthonormal rows, but.*off by nan"),
            (ONE[:2], [1.0], r"values must be 2 numbers.*shape \(1,\)"),
        ],
    )
    def test_what_are_no_pairs(self, vectors, values, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            deflated(of_matrix(MATRIX), vectors, values)


def only_blocks(matrix: Tensor, *groups: list[int]) -> Tensor:
    found = torch.zeros_like(matrix)
    for group in groups:
        index = torch.tensor(group)
        found[index[:, None], index] = matrix[index[:, None], index]
    return found


class TestBlocks:
    @pytest.mark.parametrize(
        ("blocks", "groups"),
        [
            (None, [[0, 1, 2], [3]]),
            (1, [[0, 1, 2], [3]]),
            (["a", "b"], [[0, 1, 2], [3]]),
            (["b", "a.bias", "a.weight"], [[0, 1], [2], [3]]),
            ([slice(0, 1), slice(1, 4)], [[0], [1, 2, 3]]),
            ([slice(1, None), slice(1)], [[0], [1, 2, 3]]),
            ([slice(None)], [[0, 1, 2, 3]]),
        ],
        ids=str,
    )
    def test_nothing_couples_them(self, blocks, groups):
        operator, calls = counted(named())
        found = block_diagonal(operator, blocks)
        assert torch.equal(dense(found), only_blocks(MATRIX, *groups))
        assert found.parts == NAMES
        assert len(calls) == 4 * len(groups)

    def test_a_module_need_not_be_in_one_piece(self):
        parts = {
            "scale": slice(0, 1),
            "a.b.w": slice(1, 2),
            "a.w": slice(2, 3),
            "bias": slice(3, 4),
        }
        matrix = dense(block_diagonal(named(parts=parts)))
        assert torch.equal(matrix, only_blocks(MATRIX, [0, 3], [1], [2]))
        matrix = dense(block_diagonal(named(parts=parts), 1))
        assert torch.equal(matrix, only_blocks(MATRIX, [0, 3], [1, 2]))

    def test_of_a_network(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        groups = list(range(49)), list(range(49, 73))
        found = dense(block_diagonal(operator))
        torch.testing.assert_close(found, only_blocks(dense(operator), *groups))

    @pytest.mark.parametrize(
        ("blocks", "sentence"),
        [
            ([slice(0, 2), slice(3, 4)], "a.bias is in no block: name one"),
            ([slice(0, 3), slice(2, 4)], "must not overlap, but a.bias is in two"),
            (["a", "a.bias", "b"], "must not overlap, but a.bias is in two"),
            (["a"], "b.weight is in no block"),
            (["a", "b", "c"], "'c' is no module or parameter"),
            ([slice(0, 4, 2), slice(1, 4, 2)], "must have step 1"),
            (0, "a depth of 1 or more, but is 0"),
        ],
        ids=str,
    )
    def test_blocks_that_are_none(self, blocks, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            block_diagonal(named(), blocks)

    def test_modules_without_names(self):
        with pytest.raises(DyndiagError, match=r"no names, so its modules.*pass blocks as slices"):
            block_diagonal(of_matrix(MATRIX))
        with pytest.raises(DyndiagError, match="entry 2 is in no block"):
            block_diagonal(of_matrix(MATRIX), [slice(0, 2)])


class TestSciPy:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_its_solvers_take_it(self, dtype):
        spectrum = np.r_[np.linspace(0, 1, 30), 5.0, -4.0]
        operator = of_matrix(matrix_with(spectrum), dtype).to_scipy()
        assert operator.shape == (32, 32)
        assert operator.dtype == (np.float64 if dtype is torch.float64 else np.float32)
        start = np.ones(32)
        for which, expected in (("LA", 5.0), ("SA", -4.0)):
            found = eigsh(operator, 1, which=which, v0=start, return_eigenvectors=False)
            assert found[0] == pytest.approx(expected, rel=1e-5)

    def test_products_of_any_shape_and_type(self):
        operator, matrix = of_matrix(MATRIX).to_scipy(), MATRIX.numpy()
        x = np.arange(4.0)
        x.flags.writeable = False
        np.testing.assert_allclose(operator @ x, matrix @ x)
        np.testing.assert_allclose(operator @ x[:, None], matrix @ x[:, None])
        np.testing.assert_allclose(operator @ np.eye(4, dtype=int), matrix)
        np.testing.assert_allclose(operator.T @ x, matrix @ x)
        np.testing.assert_allclose((2 * operator + operator.H) @ x, 3 * matrix @ x)

    def test_of_a_network(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        top = eigsh(operator.to_scipy(), 1, which="LA", v0=np.ones(operator.size))[0]
        assert top[0] == pytest.approx(float(torch.linalg.eigvalsh(dense(operator))[-1]))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_from_another_device(self):
        operator = of_matrix(MATRIX.cuda())
        np.testing.assert_allclose(operator.to_scipy() @ np.eye(4), MATRIX.numpy())


@given(
    st.recursive(
        st.sampled_from(["a", "b"]),
        lambda inner: (
            st.tuples(st.sampled_from("+-"), inner, inner)
            | st.tuples(st.just("*"), st.floats(-3, 3), inner)
            | st.tuples(st.just("shift"), st.floats(-3, 3), inner)
        ),
        max_leaves=6,
    )
)
def test_any_expression_is_symmetric_and_that_of_matrices(expression: Any) -> None:
    def made(tree: Any, leaves: dict[str, Any], shift: Any) -> Any:
        if isinstance(tree, str):
            return leaves[tree]
        kind, left, right = tree
        if kind == "*":
            return left * made(right, leaves, shift)
        if kind == "shift":
            return shift(made(right, leaves, shift), left)
        left, right = made(left, leaves, shift), made(right, leaves, shift)
        return left + right if kind == "+" else left - right

    found = dense(made(expression, {"a": named(), "b": named(OTHER)}, shifted))
    expected = made(expression, {"a": MATRIX, "b": OTHER}, lambda m, n: m + n * ONE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-10)
