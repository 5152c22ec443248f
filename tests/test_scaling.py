"""Models that are `2^e` times as large give a base that is `2^e` times as large, and nothing else changes.

As long as their numbers are normal numbers of their dtype; below, their step is fixed, and the noise says so.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import detune
from detune.adapters.changes import Kept
from detune.certificate.certify import certify
from detune.certificate.verdict import Certificate, Verdict
from detune.methods import SOLVERS, Auto, Lattice, Mean
from detune.metrics import w_error
from detune.numerics.float_grid import nearest, times_power_of_two
from detune.problem import Recovery, Solver, Stack
from detune.problem.solving import solve
from tests.cases import REGIMES, Regime, make_problem, normal, seeded
from tests.families import Fine, add, delta, edit, plain_family, save_plain, stored


@dataclass(frozen=True)
class Cut:
    """A solver that is told a rank."""

    solver: Solver
    rank: int

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        return self.solver.solve(stack, self.rank)


SMALL = Regime(shape=(32, 24), ranks=(2, 2, 2), scale=0.01, dtype=torch.float32)
ON_GRID = make_problem(SMALL, seeded(1))
GRID = nearest(ON_GRID.W_star, torch.bfloat16)


def stack_of(regime: Regime, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(make_problem(regime, seeded(seed)).stack)


LARGER = make_problem(Regime(ranks=(3, 3, 3), scale=0.2), seeded())
# One of each verdict, and of each way to it.
VERDICTS: dict[str, tuple[Solver, tuple[Tensor, ...], Verdict]] = {
    "float32": (Auto(), stack_of(SMALL), Verdict.FLOOR),
    "float64": (Auto(), stack_of(replace(SMALL, dtype=torch.float64)), Verdict.APPROXIMATE),
    "few models with a grid": (Auto(), tuple((GRID + M_i).float() for M_i in ON_GRID.deltas), Verdict.EXACT),
    "confirmed agreement": (
        Auto(),
        (*ON_GRID.stack[[0, 0, 1, 2]], *[ON_GRID.W_star.float()] * 2),
        Verdict.EXACT,
    ),
    "agreement": (Auto(), tuple(ON_GRID.stack[[0, 1, 0]]), Verdict.APPROXIMATE),
    "bits": (
        Auto(),
        tuple((nearest(LARGER.W_star, torch.bfloat16) + M_i).bfloat16() for M_i in LARGER.deltas),
        Verdict.APPROXIMATE,
    ),
    "bits of one model": (Lattice(), ((GRID + 1e-2 * ON_GRID.deltas[0]).float(),), Verdict.EXACT),
    "a rank too low": (Cut(SOLVERS["intersect"](), 1), stack_of(SMALL), Verdict.APPROXIMATE),
    "two models": (Cut(SOLVERS["spectral"](iterations=20), 2), stack_of(SMALL)[:2], Verdict.NOT_DETERMINED),
    "no deltas": (Mean(), stack_of(SMALL), Verdict.NOT_DETERMINED),
}
METHODS: dict[str, tuple[Tensor, ...]] = {
    "spectral": stack_of(SMALL),
    "intersect": stack_of(SMALL),
    "lattice": stack_of(replace(SMALL, ranks=(1, 1, 1), scale=1e-6)),
    "lokr": stack_of(replace(REGIMES["Kronecker products"], shape=(36, 25), dtype=torch.float32)),
    "dora": stack_of(SMALL),
    "shira": stack_of(replace(REGIMES["few entries"], shape=(32, 24), dtype=torch.float32)),
    "vera": stack_of(replace(REGIMES["frozen factors"], shape=(32, 24), ranks=(8, 8, 8))),
    "mean": stack_of(SMALL),
    "single": stack_of(SMALL),
}


def room(matrices: tuple[Tensor, ...]) -> tuple[int, int]:
    """The exponents that leave all numbers normal, with two to spare for what is computed of them."""
    dtype = max((W_i.dtype for W_i in matrices), key=lambda dtype: torch.finfo(dtype).tiny)
    sizes = torch.cat([W_i.double().abs().flatten() for W_i in matrices])
    sizes = sizes[sizes > 0]
    tiny, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    least = math.ceil(math.log2(tiny) - math.log2(float(sizes.min())))
    return least, math.floor(math.log2(most) - math.log2(float(sizes.max()))) - 2


def answer(solver: Solver, matrices: tuple[Tensor, ...]) -> tuple[Recovery, Certificate]:
    stack = Stack.of(matrices)
    recovery = solve(solver, stack)
    return recovery, certify(stack, recovery, matrices[0].dtype)


FEW_EXAMPLES = settings(max_examples=4)


def exponents(matrices: tuple[Tensor, ...]) -> st.SearchStrategy[int]:
    least, most = room(matrices)
    return st.sampled_from([least, most]) | st.integers(least, most)


@pytest.mark.parametrize("name", VERDICTS)
@FEW_EXAMPLES
@given(data=st.data())
def test_answers_and_verdicts_scale_with_the_models(name, data):
    solver, matrices, verdict = VERDICTS[name]
    assert answer(solver, matrices)[1].verdict is verdict
    assert_scales(solver, matrices, data.draw(exponents(matrices)))


@pytest.mark.parametrize("name", METHODS)
@FEW_EXAMPLES
@given(data=st.data())
def test_every_method_scales_with_the_models(name, data):
    matrices = METHODS[name]
    assert_scales(SOLVERS[name](), matrices, data.draw(exponents(matrices)))


def assert_scales(solver: Solver, matrices: tuple[Tensor, ...], exponent: int) -> None:
    recovery, certificate = answer(solver, matrices)
    scaled, of_scaled = answer(solver, tuple(times_power_of_two(W_i, exponent) for W_i in matrices))
    assert torch.equal(scaled.weight, times_power_of_two(recovery.weight, exponent))
    assert (scaled.method, scaled.ranks, scaled.noise_ratio) == (recovery.method, recovery.ranks, recovery.noise_ratio)
    for M_i, of_M_i in zip(recovery.deltas, scaled.deltas, strict=True):
        expected = times_power_of_two(M_i.dense(), exponent)
        assert float((of_M_i.dense() - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert (of_scaled.verdict, of_scaled.undetermined) == (certificate.verdict, certificate.undetermined)
    shift = 2 * exponent * math.log10(2)
    for figure in ("predicted_w_error", "best_w_error", "worst_w_error", "agreement"):
        before, after = getattr(certificate, figure), getattr(of_scaled, figure)
        assert after == (None if before is None else pytest.approx(before + shift, abs=1e-6))


def in_full(model: Path, path: Path, exponent: int) -> Path:
    """A model of which every matrix was moved a little in every direction too, as training it in full does."""
    generator = seeded(7)

    def moved(W: Tensor) -> Tensor:
        return (times(W, -exponent).double() + 1e-4 * normal(generator, *W.shape)).to(W.dtype)

    return save_plain(
        path, {name: times(moved(W), exponent) if "layer" in name else W for name, W in stored(model).items()}
    )


def times(values: Tensor, exponent: int) -> Tensor:
    return times_power_of_two(values, exponent) if values.is_floating_point() else values


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    return plain_family(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["least", "largest"])
def scaled(request, fine: Fine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fine, int]:
    """A family times a power of two, and the exponent."""
    folder = tmp_path_factory.mktemp("scaled")
    states = {path: stored(path) for path in (fine.base, *fine.models)}
    floats = [W for state in states.values() for W in state.values() if W.is_floating_point()]
    exponent = room(tuple(floats))[request.param == "largest"]
    for path, state in states.items():
        save_plain(folder / path.name, {name: times(W, exponent) for name, W in state.items()})
    return Fine(folder / fine.base.name, tuple(folder / path.name for path in fine.models)), exponent


class TestCommands:
    """Through files: `recover`, `family` and `extract`."""

    @pytest.mark.parametrize("method", ["auto", "intersect", "mean"])
    def test_recover(self, fine, scaled, tmp_path, method):
        bigger, exponent = scaled
        report, other = (
            detune.recover(family.models, tmp_path / name, method) for family, name in ((fine, "a"), (bigger, "b"))
        )
        weights, others = stored(tmp_path / "a"), stored(tmp_path / "b")
        assert all(torch.equal(times(W, exponent), others[name]) for name, W in weights.items())
        assert [(row.verdict, row.method, row.ranks) for row in report.tensors] == [
            (row.verdict, row.method, row.ranks) for row in other.tensors
        ]
        shifts = [
            after.predicted_w_error - before.predicted_w_error
            for before, after in zip(report.tensors, other.tensors, strict=True)
            if before.predicted_w_error is not None
        ]
        assert shifts == pytest.approx([2 * exponent * math.log10(2)] * len(shifts))
        comparison, of_other = detune.compare(tmp_path / "a", fine.base), detune.compare(tmp_path / "b", bigger.base)
        gained = of_other.summary["mean_w_error"] - comparison.summary["mean_w_error"]
        assert gained == pytest.approx(2 * exponent * math.log10(2))

    def test_family(self, fine, scaled):
        before, after = (detune.check_family(family.models) for family in (fine, scaled[0]))
        assert after.suffices
        assert [(row.name, row.ranks) for row in after.tensors] == [(row.name, row.ranks) for row in before.tensors]

    def test_a_stranger_is_told(self, scaled, tmp_path):
        bigger, exponent = scaled
        state = {name: W if "layer" not in name else times(normal(seeded(9), *W.shape).float(), exponent)
                 for name, W in stored(bigger.base).items()}  # fmt: skip
        stranger = save_plain(tmp_path / "stranger", state)
        *_, last = detune.check_family([*bigger.models, stranger]).models
        assert not last.belongs
        assert "it has another base" in last.reason

    @pytest.mark.parametrize("denoise", [False, True])
    def test_extract(self, fine, scaled, tmp_path, denoise):
        extractions = []
        for name, family, exponent in (("a", fine, 0), ("b", *scaled)):
            if denoise:
                family = Fine(family.base, (in_full(family.models[0], tmp_path / name / "model", exponent),))
            extractions.append(
                detune.extract(family.models, tmp_path / f"of {name}", base=family.base, denoise=denoise)
            )
        before, after = extractions
        assert [replace(row, largest_deviation=0.0) for row in after.rows] == [
            replace(row, largest_deviation=0.0) for row in before.rows
        ]
        assert any(row.kept is Kept.LORA for row in after.rows)
        assert all(row.reason.startswith("denoised") is denoise for row in after.rows)

    @pytest.mark.parametrize("exponent", [-900, 900])
    def test_a_change_that_float32_factors_cannot_hold_is_kept_whole(self, fine, tmp_path, exponent):
        W = stored(fine.base)["layer.0.weight"].double()
        states = {"base": W, "model": add(W, delta(seeded(4), W, rank=2))}
        for name, matrix in states.items():
            other = {"layer.1.weight": W, "norm.weight": torch.ones(64, dtype=torch.float64)}
            save_plain(tmp_path / name, other | {"layer.0.weight": times(matrix, exponent)})
        edit(tmp_path / "model", lambda state: state.update({"layer.1.weight": states["model"]}))
        extraction = detune.extract([tmp_path / "model"], tmp_path / "out", base=tmp_path / "base")
        assert [(row.name, row.kept, row.identical, row.reason) for row in extraction.rows] == [
            ("layer.0.weight", Kept.WHOLE, 1.0, "a change of this size has no float32 factors"),
            ("layer.1.weight", Kept.LORA, pytest.approx(0, abs=0.1), ""),
        ]


def test_below_the_normal_numbers_the_noise_is_that_of_the_fixed_step():
    problem = make_problem(SMALL, seeded(2))
    exponent = -138
    stack = Stack.of([times_power_of_two(W_i, exponent) for W_i in problem.stack])
    recovery = solve(Auto(), stack)
    certificate = certify(stack, recovery, torch.float32)
    assert certificate.verdict is Verdict.APPROXIMATE
    assert "below the smallest normal number" in certificate.reason
    truth = times_power_of_two(problem.W_star, exponent)
    assert w_error(recovery.weight, truth) == pytest.approx(certificate.predicted_w_error, abs=0.5)
    assert w_error(recovery.weight.float(), truth) < certificate.worst_w_error


@pytest.mark.parametrize("exponent", [-1000, 0, 1000])
def test_the_measure_has_no_range(exponent):
    one = times_power_of_two(normal(seeded(1), 20, 20), exponent)
    other = times_power_of_two(normal(seeded(2), 20, 20), exponent)
    plain = w_error(times_power_of_two(one, -exponent), times_power_of_two(other, -exponent))
    assert w_error(one, other) == pytest.approx(plain + 2 * exponent * math.log10(2))
    assert w_error(one, one) == -math.inf
