"""A full fine-tune's change: what stands over its noise, as an adapter."""

import math

import pytest
import torch
from torch import Tensor

import detune
from detune.adapters.changes import Kept
from detune.adapters.denoise import denoise_change
from detune.checkpoints import open_checkpoint
from detune.errors import InputError
from detune.numerics.float_grid import times_power_of_two
from detune.numerics.noise_spectrum import hard_threshold, noise_singular_value
from detune.plan import plan_extraction
from tests.cases import normal, seeded
from tests.families import edit, plain_family, plain_state, save_plain


def problem(seed: int, shape: tuple[int, int], rank: int, noise: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """A base, a fine-tune of it, and the part of its change that is no noise, from three times the bulk's edge on."""
    generator = seeded(seed)
    W = 0.05 * normal(generator, *shape)
    edge = noise * (shape[0] ** 0.5 + shape[1] ** 0.5)
    U, V = (torch.linalg.qr(normal(generator, side, rank))[0] for side in shape)
    signal = U * torch.linspace(3, 10, rank, dtype=torch.float64) * edge @ V.mT
    return W.float(), (W + signal + noise * normal(generator, *shape)).float(), signal


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(96, 96), (60, 160), (160, 60)])
def test_the_signals_rank_is_found_and_most_of_the_noise_is_gone(seed, shape):
    W, W_ft, signal = problem(seed, shape, rank=5)
    found = denoise_change(W, W_ft)
    assert found.change.rank == 5
    error = float((found.change.dense() - signal).norm())
    assert error < 0.6 * float(((W_ft - W).double() - signal).norm())
    assert 0.5 < found.kept < 1


def test_of_noise_nothing_is_kept():
    generator = seeded(4)
    W = normal(generator, 80, 120).float()
    found = denoise_change(W, W + 0.01 * normal(generator, 80, 120).float())
    assert (found.change.rank, found.kept) == (0, 0.0)


def test_the_rank_can_be_limited():
    W, W_ft, _ = problem(0, (96, 96), rank=5)
    assert denoise_change(W, W_ft, rank=2).change.rank == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_answer_scales_with_the_matrices(dtype):
    W, W_ft = (matrix.to(dtype) for matrix in problem(1, (60, 160), rank=5)[:2])
    found = denoise_change(W, W_ft)
    limits = torch.finfo(dtype)
    sizes = torch.cat([W.flatten(), W_ft.flatten()]).double().abs()
    least = math.ceil(math.log2(limits.tiny) - math.log2(float(sizes[sizes > 0].min())))
    most = math.floor(math.log2(limits.max) - math.log2(float(sizes.max())))
    for exponent in (least, most):
        scaled = denoise_change(*(times_power_of_two(matrix, exponent) for matrix in (W, W_ft)))
        assert (scaled.change.rank, scaled.kept) == (found.change.rank, found.kept)
        assert torch.equal(scaled.change.times_power_of_two(-exponent).dense(), found.change.dense())


def test_an_outlier_does_not_hide_the_change():
    W, W_ft, signal = problem(2, (96, 96), rank=5)
    W_ft[3, 5] = 1e30
    found = denoise_change(W, W_ft)
    assert found.change.rank == 5
    assert float((found.change.dense() - signal).norm()) < 0.3 * float(signal.norm())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_the_threshold_is_the_published_one(ratio):
    """Gavish & Donoho's own approximation, good to 0.02: a cubic in the ratio of the sides."""
    cubic = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    assert hard_threshold(round(1000 * ratio), 1000) == pytest.approx(cubic, abs=0.02)


def test_the_threshold_of_a_square_is_four_over_root_three_of_the_noise():
    assert hard_threshold(500, 500) * noise_singular_value(0.5, 500, 500) / 500**0.5 == pytest.approx(4 / 3**0.5)


class TestExtract:
    @pytest.fixture(scope="class")
    @staticmethod
    def tuned(tmp_path_factory):
        """A LoRA fine-tune whose matrices were moved a little in every direction too."""
        family = plain_family(tmp_path_factory.mktemp("family"))
        generator = seeded(7)

        def move(state: dict[str, Tensor]) -> None:
            for name, tensor in state.items():
                if tensor.ndim == 2:
                    state[name] = tensor + 1e-4 * normal(generator, *tensor.shape).to(tensor.dtype)

        edit(family.models[0], move)
        return family

    def test_without_it_such_a_model_is_refused(self, tuned, tmp_path):
        with pytest.raises(
            InputError, match=r"is not the base of .* extract --denoise keeps what stands over the noise"
        ):
            detune.extract(tuned.models[:1], tmp_path / "out", base=tuned.base)

    def test_its_adapter_has_what_stands_over_the_noise(self, tuned, tmp_path):
        extraction = detune.extract(tuned.models[:1], tmp_path / "out", base=tuned.base, denoise=True)
        rows = [row for row in extraction.rows if row.kept is Kept.LORA]
        assert rows
        with open_checkpoint(tuned.base) as base, open_checkpoint(tuned.models[0]) as model:
            for row in rows:
                expected = denoise_change(base.read(row.name), model.read(row.name))
                assert row.rank == expected.change.rank < min(row.shape) // 2
                assert row.reason == f"denoised: {expected.kept:.0%} of the change stands over its noise"

    def test_another_base_is_refused(self, tuned, tmp_path):
        state = {name: normal(seeded(5), *tensor.shape).to(tensor.dtype) for name, tensor in plain_state().items()}
        other = save_plain(tmp_path / "other", state)
        with pytest.raises(InputError, match=r"is not the base of .*unrelated|another base"):
            detune.extract(tuned.models[:1], tmp_path / "out", base=other, denoise=True)
        assert not (tmp_path / "out").exists()

    def test_what_it_would_write_can_be_planned(self, tuned, tmp_path):
        with pytest.raises(InputError, match="is not the base of"):
            plan_extraction(tuned.models[:1], tmp_path / "out", base=tuned.base)
        plan = plan_extraction(tuned.models[:1], tmp_path / "out", base=tuned.base, denoise=True)
        assert plan.command == "extract"
        assert not (tmp_path / "out").exists()
