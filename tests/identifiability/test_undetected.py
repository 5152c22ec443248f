"""What a direction leaves in the data when it is not in its model's rank, by brute force."""

import pytest
import torch

from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.undetected import undetected_directions
from tests.cases import Regime, make_problem, normal, seeded
from tests.fitting.test_gauss_newton import dense_operator, projectors, spaces


def test_strength_and_move_are_those_of_least_squares():
    """Fit W and the other factors to `u v^T` in one model: what is left is `rho`, and W moves by the rest."""
    U, V = spaces(make_problem(Regime(shape=(30, 26), ranks=(2, 2, 2), shared_rows=0.95), seeded()))
    operator = NormalOperator.of(U, V)
    found = next(
        undetected
        for undetected in undetected_directions(operator, 1.0)
        if not undetected.columns and len(undetected.strengths)
    )
    i, rho = found.model, 1 / float(found.strengths[0])
    P, R = projectors(U), projectors(V)
    G = sum(R)
    values, vectors = torch.linalg.eigh(R[i] @ torch.linalg.inv(G) @ R[i])
    v = vectors[:, -1]
    u = normal(seeded(1), 30)
    u -= operator.Q @ (operator.Q.mT @ u)
    Z = P[i] @ torch.outer(u / u.norm(), v) @ R[i]
    moved = torch.linalg.solve(dense_operator(U, V), Z.reshape(-1))
    left = float(Z.square().sum() - Z.reshape(-1) @ moved)
    assert left == pytest.approx(rho**2, rel=1e-6)
    assert float(moved.norm()) == pytest.approx(float(found.moves[0]), rel=1e-6)
    assert rho == pytest.approx(float(1 - values[-1]) ** 0.5, rel=1e-6)


def test_spaces_that_are_far_apart_hide_nothing_stronger_than_noise():
    generator = seeded()
    basis = torch.linalg.qr(normal(generator, 40, 40))[0]
    U = [basis[:, 3 * i : 3 * i + 3] for i in range(4)]
    for undetected in undetected_directions(NormalOperator.of(U, U), 1.0):
        assert (undetected.strengths <= 2**0.5 + 1e-9).all()


def test_a_direction_that_all_others_hold_hides_completely():
    U, V = spaces(make_problem(Regime(shape=(30, 26), ranks=(2, 2, 2)), seeded()))
    V[2] = torch.linalg.qr(torch.stack([V[1][:, 0], V[2][:, 1]], dim=1))[0]
    strengths = {
        u.model: float(u.strengths[0])
        for u in undetected_directions(NormalOperator.of(U, V), 1.0)
        if len(u.strengths) and not u.columns
    }
    assert strengths[0] > 1e6
