"""Products and tall factorisations, whichever way they are computed."""

import pytest
import torch
from torch import Tensor

from detune.numerics import linalg
from detune.numerics.linalg import joint_basis, orthonormal, product, qr, randomized_svd, thin_svd, weighted_sum


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 30, 20), (64, 4096, 16), (16, 4096, 64), (300, 200, 300)])
@pytest.mark.parametrize("by_columns", [(False, False), (True, False), (False, True), (True, True)])
def test_product_is_the_product_however_matrices_lie_in_memory(
    shape: tuple[int, int, int], by_columns: tuple[bool, bool]
) -> None:
    rows, inner, columns = shape
    A = random(inner, rows).mT if by_columns[0] else random(rows, inner)
    B = random(columns, inner, seed=1).mT if by_columns[1] else random(inner, columns, seed=1)
    expected = A.double() @ B.double()
    scale = inner**0.5
    assert float((product(A, B).double() - expected).abs().max()) < 1e-6 * scale * 4
    assert torch.equal(product(A.double(), B.double()), A.double() @ B.double())


@pytest.mark.parametrize("by_columns", [False, True])
def test_product_hands_over_no_part_of_a_wider_matrix(by_columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a second factor, oneDNN takes it a thousand times as long."""
    wide = random(256, 512)
    part = wide[:, 100:356].mT if by_columns else wide[:, 100:356]
    given = []

    def onednn(A: Tensor, B: Tensor, *rest: object) -> Tensor:
        given.append(B)
        return A @ B.mT

    monkeypatch.setattr(linalg, "_ONEDNN", onednn)
    monkeypatch.setattr(linalg, "_LARGE", 1)
    torch.testing.assert_close(product(part, part), part @ part)
    torch.testing.assert_close(product(wide.mT, part), wide.mT @ part)
    assert all(B.is_contiguous() or B.mT.is_contiguous() for B in given)
    assert len(given) == 2


def test_product_without_onednn_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = random(64, 4096), random(4096, 16, seed=1)
    monkeypatch.setattr(linalg, "_ONEDNN", None)
    assert torch.equal(product(A, B), A @ B)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-9])
def test_factors_give_the_matrix_back(spread: float) -> None:
    tall = random(200, 12, dtype=torch.float64) * torch.logspace(0, torch.tensor(spread).log10(), 12).double()
    Q, R = qr(tall)
    torch.testing.assert_close(Q @ R, tall, rtol=0, atol=1e-13)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("spread", [1.0, 0.05, 1e-3, 1e-6])
def test_factors_of_float32_are_as_exact_as_it_is(spread: float) -> None:
    tall = random(4000, 12) * torch.logspace(0, torch.tensor(spread).log10(), 12)
    Q, R = qr(tall)
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q.double() @ R, tall.double(), rtol=0, atol=3e-6)
    torch.testing.assert_close(Q.double().mT @ Q.double(), torch.eye(12).double(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("shared", [0, 3, 5])
def test_joint_basis_holds_all_spaces_and_counts_what_they_share_once(shared: int) -> None:
    first = orthonormal(random(100, 5, dtype=torch.float64))
    second = orthonormal(torch.cat([first[:, :shared], random(100, 5 - shared, seed=1, dtype=torch.float64)], dim=1))
    Q, R = joint_basis([first, second])
    assert Q.shape == (100, 10 - shared)
    torch.testing.assert_close(Q @ R, torch.cat([first, second], dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.999])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_joint_basis_is_as_exact_as_its_dtype_however_close_spaces_are(
    overlap: float, dtype: torch.dtype, exact: float
) -> None:
    first = orthonormal(random(400, 8, dtype=torch.float64))
    second = orthonormal(overlap * first + (1 - overlap**2) ** 0.5 * orthonormal(random(400, 8, seed=1).double()))
    Q, R = joint_basis([first.to(dtype), second.to(dtype)])
    assert Q.dtype == dtype
    torch.testing.assert_close(Q.double() @ R, torch.cat([first, second], dim=1), rtol=0, atol=exact)
    torch.testing.assert_close(Q.double().mT @ Q.double(), torch.eye(16).double(), rtol=0, atol=exact)


def test_weighted_sum_is_the_sum() -> None:
    matrices = random(3, 30, 20, dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(matrices, 0.25), 0.25 * matrices.sum(dim=0))
    assert torch.equal(weighted_sum(matrices[:0], 0.25), torch.zeros_like(matrices[0]))


@pytest.mark.parametrize("least", [0.0, 1e-3, 0.1])
def test_thin_svd_is_exact_for_all_that_matters(least: float) -> None:
    S = torch.logspace(0, -4, 9, dtype=torch.float64)
    U, V = (orthonormal(random(rows, 9, seed=rows, dtype=torch.float64)) for rows in (200, 9))
    found_U, found_S, found_V = thin_svd((U * S @ V.mT).float(), least)
    kept = S.ge(least)
    assert torch.allclose(found_S[kept], S[kept], rtol=1e-3)
    assert torch.allclose((found_U.double() * found_S) @ found_V.mT, U * S @ V.mT, atol=1e-6)
    inner = found_U[:, kept].double().mT @ found_U[:, kept].double()
    assert torch.allclose(inner, torch.eye(len(inner), dtype=torch.float64), atol=2e-3)


def test_singular_vectors_of_many_rows_are_as_long_as_float32_can_tell() -> None:
    """A sum of 20000 squares in float32 loses two digits, and what is found of float32 merges with them."""
    U = thin_svd(random(20000, 5).mT.contiguous().mT)[0]
    torch.testing.assert_close(U.double().norm(dim=0), torch.ones(5).double(), rtol=0, atol=1e-7)
    tall = thin_svd(random(20000, 5))[0]
    torch.testing.assert_close(tall.double().norm(dim=0), torch.ones(5).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (3, 60, 40), (3, 40, 60)])
def test_randomized_svd_finds_what_leads(shape: tuple[int, ...]) -> None:
    small = random(*shape[:-1], 5, dtype=torch.float64) @ random(*shape[:-2], 5, shape[-1], seed=1, dtype=torch.float64)
    U, S, V = randomized_svd(small, 5, torch.Generator().manual_seed(2))
    assert torch.allclose((U * S.unsqueeze(-2)) @ V.mT, small, rtol=0, atol=1e-12)
    assert torch.allclose(S, torch.linalg.svdvals(small)[..., :5])
    assert torch.allclose(U.mT @ U, torch.eye(5).double())
    assert torch.allclose(V.mT @ V, torch.eye(5).double())


def test_randomized_svd_is_torchs_from_the_same_draws() -> None:
    """The published code calls `torch.svd_lowrank`."""
    matrix = random(50, 30)
    ours = randomized_svd(matrix, 6, torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = torch.svd_lowrank(matrix, q=6, niter=2)
    for part, published in zip(ours, expected, strict=True):
        assert torch.equal(part, published)
