"""max dᵀHd over the ball of a norm: against every vertex, and where sign descent hovers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dyndiag.curvature import Operator, eigenpairs, loss_hessian
from dyndiag.curvature.generalized_sharpness import generalized_sharpness
from dyndiag.errors import DyndiagError
from tests.oracles.quadratics import positive_definite
from tests.oracles.spectra import counted, of_diagonal, of_matrix, seeded


@pytest.mark.parametrize("seed", range(6))
def test_signs_against_every_vertex(seed: int) -> None:
    hessian = positive_definite(9, seed)
    corners = torch.tensor(list(product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    truth = float(torch.einsum("ni,ij,nj->n", corners, hessian, corners).max())
    operator, calls = counted(of_matrix(hessian))
    found = generalized_sharpness(operator, "sign", restarts=12)
    assert found.value == pytest.approx(truth, rel=1e-2) and found.value <= truth * (1 + 1e-9)
    assert float(found.direction @ hessian @ found.direction) == pytest.approx(found.value)
    assert found.direction.abs().max() <= 1 + 1e-12
    assert len(calls) == found.products and found.converged
    assert max(found.values) == found.value and 1 <= found.agreeing <= len(found.values) == 12


def test_negative_curvature_is_left_out() -> None:
    assert generalized_sharpness(of_diagonal([4.0, 1.0, -3.0]), "sign").value == pytest.approx(5.0)
    assert generalized_sharpness(of_diagonal([-4.0, -1.0]), "sign").value == pytest.approx(0.0)
    assert generalized_sharpness(of_diagonal([0.0, 0.0]), "sign").value == 0.0


def test_spectral_closed_forms() -> None:
    identity = of_diagonal(
        [1.0] * 15 + [7.0] * 2
    )  # a 3 × 5 matrix, and two biases that stand still
    found = generalized_sharpness(identity, "spectral", shapes=[(3, 5), (2,)])
    assert found.value == pytest.approx(3.0)  # ‖D‖_F² of any D with three singular values of 1
    a = positive_definite(3, seed=1)
    rows = Operator(
        lambda v: (a @ v.view(3, 4)).flatten(), 12, torch.float64, torch.device("cpu")
    )  # tr DᵀAD ≤ tr A
    found = generalized_sharpness(rows, "spectral", shapes=[(3, 2, 2)])
    assert found.value == pytest.approx(float(a.trace()), rel=1e-3)
    assert torch.linalg.matrix_norm(found.direction.view(3, 4), 2) <= 1 + 1e-9


def test_the_same_each_time_and_the_generator_s_own() -> None:
    operator = of_matrix(positive_definite(30, seed=2))
    first, again = (generalized_sharpness(operator, "sign", restarts=1) for _ in range(2))
    assert first.value == again.value
    other = {
        generalized_sharpness(operator, "sign", restarts=1, generator=seeded(i)).value
        for i in range(5)
    }
    assert len(other) > 1
    cut_short = generalized_sharpness(operator, "sign", restarts=1, max_products=2)
    assert not cut_short.converged and cut_short.products == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_are_no_maximum() -> None:
    found = generalized_sharpness(of_diagonal([float("inf"), 1.0]), "sign")
    assert not found.converged


@pytest.mark.parametrize(
    ("norm", "options"),
    [("nuclear", {}), ("sign", {"restarts": 0}), ("sign", {"max_products": 3}), ("spectral", {}),
     ("spectral", {"shapes": [(2, 2)]})],
)  # fmt: skip
def test_what_is_refused(norm: str, options: dict[str, object]) -> None:
    with pytest.raises(DyndiagError):
        generalized_sharpness(of_diagonal([1.0] * 5), norm, **options)  # type: ignore[arg-type]


def test_sign_descent_hovers_at_its_own_edge_where_the_sharpness_sees_nothing() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model = model.double()
    x = torch.randn(40, 4, generator=seeded(1)).double()
    y, weights, rate = torch.sin(3 * x[:, :2]), list(model.parameters()), 0.005

    def loss() -> Tensor:
        return 0.5 * (model(x) - y).square().sum(1).mean()

    generalized, plain = [], []
    for step in range(401):
        slopes = torch.autograd.grad(loss(), weights)
        length = torch.stack([g.abs().sum() for g in slopes]).sum()
        if step % 100 == 0:
            hessian = loss_hessian(loss, weights)
            generalized.append(rate * generalized_sharpness(hessian, "sign").value / 2)
            plain.append(rate * float(eigenpairs(hessian).values[0]) / 2)
        with torch.no_grad():
            for p, g in zip(weights, slopes, strict=True):
                p.sub_(rate * length * g.sign())
    assert generalized[0] < 0.3
    assert all(0.85 < ratio < 1.2 for ratio in generalized[3:])
    assert max(plain) < 0.03
