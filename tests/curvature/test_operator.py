"""Combinators of operators, against the matrices they stand for."""

from __future__ import annotations

import torch

from dyndiag.curvature import negated, scaled
from tests.oracles.spectra import counted, dense, matrix_with, of_matrix, seeded

MATRIX = matrix_with([-2.0, 0.5, 3.0, 7.0])


def test_scaling_and_shift():
    root, shift = torch.rand(2, 4, generator=seeded(0), dtype=torch.float64)
    expected = root[:, None] * MATRIX * root
    torch.testing.assert_close(dense(scaled(of_matrix(MATRIX), root)), expected)
    torch.testing.assert_close(
        dense(scaled(of_matrix(MATRIX), root, shift)), expected + torch.diag(shift)
    )


def test_negation():
    assert torch.equal(dense(negated(of_matrix(MATRIX))), -MATRIX)


def test_a_product_costs_one():
    operator, calls = counted(of_matrix(MATRIX))
    negated(scaled(operator, torch.ones(4).double(), torch.ones(4).double())).product(MATRIX[0])
    assert len(calls) == 1
