"""What only a GPU can show: `pytest -m gpu` on a machine with one. Everywhere else they are skipped."""

import pytest
import torch

import detune
from detune.certificate.certify import certify
from detune.methods import SOLVERS
from detune.numerics.device import full_precision, upload
from detune.problem import Stack
from tests.cases import CASES, REGIMES, Regime, make_problem, normal, rms, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.solver}-{case.regime}".replace(" ", "_"))
def test_equals_the_cpu_to_what_rounding_moves(case):
    """Random numbers differ between devices, so answers may as far as another seed would move them."""
    problem = make_problem(REGIMES[case.regime], seeded())
    there, here = Stack.of(problem.stack, device=CUDA), Stack.of(problem.stack)
    recovery, expected = SOLVERS[case.solver]().solve(there), SOLVERS[case.solver]().solve(here)
    assert recovery.weight.device == CUDA
    assert recovery.ranks == expected.ranks
    assert problem.error(recovery.weight.cpu()) <= case.tolerance
    if case.solver != "spectral":
        assert rms((recovery.weight.cpu() - expected.weight).double()) <= case.rounding * problem.delta_rms
    dtype = problem.stack.dtype
    assert certify(there, recovery, dtype).verdict == certify(here, expected, dtype).verdict


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_arrive_as_they_are_stored(turned, dtype):
    matrices = [normal(seeded(i), 3000, 700).to(dtype) for i in range(3)]
    if turned:
        matrices = [W_i.mT for W_i in matrices]
    runs = [slice(start, start + 129) for start in range(0, matrices[0].shape[0], 129)]
    for rows, moved in zip(runs, upload(matrices, runs, CUDA), strict=True):
        assert all(W.device == CUDA and W.dtype is dtype for W in moved)
        assert all(torch.equal(W.cpu(), W_i[rows]) for W, W_i in zip(moved, matrices, strict=True))


def test_the_users_tf32_changes_no_bit():
    problem = make_problem(Regime(shape=(1600, 1500), ranks=(8, 8, 8), scale=1e-3, dtype=torch.float32), seeded())
    weights = []
    for setting in ("highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        try:
            weights.append(detune.recover_matrix(problem.stack, "intersect", dtype=torch.float32, device=CUDA).weight)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert torch.equal(*weights)


def test_products_are_exact_where_they_were_not():
    """The test before could not fail otherwise."""
    a, b = (normal(seeded(i), 512, 512).float().to(CUDA) for i in range(2))
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            exact = a @ b
    finally:
        torch.set_float32_matmul_precision("highest")
    assert rms((exact.double() - a.double() @ b.double()).cpu()) < 1e-4
