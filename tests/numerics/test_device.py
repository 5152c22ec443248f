"""Where things are computed, on a machine that may have but one place for it."""

from contextlib import nullcontext
from threading import Barrier, Thread

import pytest
import torch

import detune
from detune.adapters.fit import fit_adapter
from detune.certificate.certify import certify
from detune.compatibility.model_set import Held
from detune.errors import InputError
from detune.lattice import LatticeSearch
from detune.methods import SOLVERS, Intersect, Lattice, Mean, Spectral
from detune.numerics.device import find_device, full_precision, upload
from detune.numerics.float_grid import times_power_of_two
from detune.problem import Recovery, Stack
from detune.problem.solving import solve
from detune.recovery.tensor import solve_tensor
from tests.cases import REGIMES, make_problem, normal, seeded
from tests.families import edit, plain_family, stored
from tests.lattice.problems import LatticeProblem
from tests.two_devices import fetched, second_device


@pytest.fixture
def elsewhere(monkeypatch):
    with second_device(monkeypatch) as device:
        yield device


# --- which device ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_is_named_with_the_cure(command):
    with pytest.raises(InputError, match=r"no device 'cuda' here; .*CUDA.*; use --device cpu, or install torch for"):
        Stack.of(torch.ones(3, 4, 4), device="cuda")
    ran = command("inspect", "a", "b", "--device", "cuda")
    assert ran.code == 2
    assert "no device 'cuda' here" in ran.err


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:7:7"])
def test_what_is_no_device(name):
    with pytest.raises(InputError, match=f"no device '{name}' here"):
        find_device(name)


@pytest.fixture
def without_float64(monkeypatch):
    """`mps`, as Apple's GPUs have it."""
    make = torch.ones

    def ones(*shape, device, dtype=torch.float32):
        if device == "mps" and dtype is torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return make(*shape, dtype=dtype)

    find_device.cache_clear()
    monkeypatch.setattr(torch, "ones", ones)
    yield
    find_device.cache_clear()


def test_without_float64_the_cpu_computes_and_says_so(without_float64):
    with pytest.warns(UserWarning, match="device 'mps' has no float64: computing on the CPU"):
        stack = Stack.of(torch.zeros(3, 4, 4), device="mps")
    assert stack.device == torch.device("cpu")


def test_the_command_says_so_in_a_line(without_float64, command, tmp_path):
    ran = command("inspect", *plain_family(tmp_path).specs, "--device", "mps")
    assert ran.code == 0
    assert ran.err == "detune: device 'mps' has no float64: computing on the CPU\n"


# --- nothing is left on the other one ---


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("mean", "plain"),
        ("single", "plain"),
        ("brief", "plain"),
        ("intersect", "tall"),
        ("auto", "one seed"),
        ("auto", "bfloat16"),
        ("auto", "one model unchanged"),
    ],
)
def test_solvers_stay_on_the_stacks_device(elsewhere, name, regime):
    problem = make_problem(REGIMES[regime], seeded())
    stack, here = Stack.of(problem.stack, device=elsewhere), Stack.of(problem.stack)
    solver = Spectral(iterations=12) if name == "brief" else SOLVERS[name]()
    recovery, expected = (solver.solve(s, 4) for s in (stack, here))
    assert torch.equal(fetched(recovery.weight), expected.weight)
    for ours, theirs in zip(recovery.deltas, expected.deltas, strict=True):
        assert torch.equal(fetched(ours.left) @ fetched(ours.right).mT, theirs.dense())
    dtype = problem.stack.dtype
    assert certify(stack, recovery, dtype) == certify(here, expected, dtype)


@pytest.mark.parametrize(("n", "delta", "sweeps"), [(1, 0.1, 1), (2, 0.3, 2), (3, 1.0, 1)])
def test_the_grid_method_stays_there(elsewhere, n, delta, sweeps):
    problem = LatticeProblem((48, 40), rank=2, n=n, delta=delta)
    stack = Stack.of(problem.stack.matrices, device=elsewhere)
    solver = Lattice(LatticeSearch(sweeps=sweeps))
    recovery, expected = solver.solve(stack), solver.solve(problem.stack)
    assert torch.equal(fetched(recovery.weight), expected.weight)
    assert recovery.bits is not None
    assert expected.bits is not None
    assert torch.equal(fetched(recovery.bits.certain), expected.bits.certain)


@pytest.mark.parametrize("damaged", [(1,), (0, 1, 2)], ids=["in one model", "in all"])
def test_scale_and_outliers_stay_there(elsewhere, damaged):
    models = times_power_of_two(make_problem(REGIMES["float32"], seeded()).stack, -90)
    models[list(damaged), 5, 7] = 1e10
    stack, here = Stack.of(models, device=elsewhere), Stack.of(models)
    recovery, expected = (solve(Intersect(), s) for s in (stack, here))
    assert torch.equal(fetched(recovery.weight), expected.weight)
    assert certify(stack, recovery, torch.float32) == certify(here, expected, torch.float32)


def test_parts_of_the_models_are_compared_there(elsewhere):
    problem = make_problem(REGIMES["many models"], seeded())
    found = solve_tensor("weight", Held.of(problem.stack), SOLVERS["intersect"](), None, elsewhere, check=True)
    assert found.result.agreement is not None


def test_an_adapter_is_fitted_there(elsewhere):
    problem = make_problem(REGIMES["bfloat16"], seeded())
    base = problem.W_star.bfloat16()
    M_i = fit_adapter(base, problem.stack[0], device=elsewhere)
    expected = fit_adapter(base, problem.stack[0])
    assert torch.equal(fetched(M_i.left), expected.left)
    assert torch.equal(fetched(M_i.right), expected.right)


def test_from_file_to_file(elsewhere, tmp_path):
    fine = plain_family(tmp_path / "models")
    for model in fine.models:
        edit(model, lambda state: [state.pop(f"layer.{i}.weight") for i in range(3)])
    detune.recover(fine.models, tmp_path / "there", "intersect", device=elsewhere, adapters=tmp_path / "loras")
    detune.recover(fine.models, tmp_path / "here", "intersect")
    there, here = stored(tmp_path / "there"), stored(tmp_path / "here")
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert detune.check_family(fine.models, device=elsewhere).suffices


def test_mixing_them_up_would_show(elsewhere):
    """The other tests of this kind could not fail otherwise."""
    there = torch.ones(3, device=elsewhere)
    with pytest.raises(RuntimeError, match="mixes devices"):
        there + torch.ones(3)
    with pytest.raises(AssertionError, match="on cpu"):
        fetched(torch.ones(3) + 1)
    assert torch.equal(fetched(there + torch.ones(3).to(elsewhere)), 2 * torch.ones(3))


# --- on the way to a GPU ---


class FakeCuda:
    """What `upload` asks of CUDA, done at once, with a record of the order."""

    def __init__(self, monkeypatch):
        self.record = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        move = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: self.move(t) if k else move(t, *a))

    def pin(self, tensor):
        assert sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) < tensor.numel()
        return tensor

    def move(self, tensor):
        self.record.append(("copy", tensor.dtype))
        return tensor.clone()

    def record_event(self):
        self.record.append("arrived")
        return len(self.record)

    def wait_event(self, event):
        self.record.append(("wait", event))


@pytest.mark.parametrize("turned", [False, True])
def test_the_next_rows_are_on_their_way_while_these_are_computed_with(monkeypatch, turned):
    matrices = [normal(seeded(i), 10, 6).bfloat16() for i in range(2)]
    if turned:
        matrices = [W_i.mT for W_i in matrices]
    out = matrices[0].shape[0]
    runs = [slice(0, 3), slice(3, 5), slice(5, out)]
    cuda = FakeCuda(monkeypatch)
    for rows, moved in zip(runs, upload(matrices, runs, torch.device("cuda")), strict=True):
        cuda.record.append(rows.start)
        assert all(torch.equal(ours, W_i[rows]) for ours, W_i in zip(moved, matrices, strict=True))
    copy = [("copy", torch.bfloat16)] * 2 + ["arrived"]
    assert cuda.record == [*copy, *copy, ("wait", 3), 0, *copy, ("wait", 6), 3, ("wait", 11), 5]


# --- TF32 and its like ---


class Noting:
    """A solver that notes how float32 matrices are multiplied while it runs."""

    min_models = 1
    low_rank = False
    working_copies = 3

    def __init__(self):
        self.seen = []

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        self.seen += [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
        return Mean().solve(stack)


@pytest.fixture(params=["medium", "high", "highest"])
def users_setting(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_products_are_in_float32_whatever_the_user_has_set(users_setting, tmp_path):
    before = [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    solver = Noting()
    detune.recover_matrix(normal(seeded(), 3, 8, 8), solver)
    with pytest.raises(InputError, match="none of 4 changed matrices can be recovered"):
        detune.recover(plain_family(tmp_path / "models").models, tmp_path / "out", solver)
    assert solver.seen == ["ieee", "ieee"] * 5
    assert torch.get_float32_matmul_precision() == users_setting
    after = [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    assert after == before


def test_the_setting_returns_after_an_error_and_from_several_threads(users_setting):
    with pytest.raises(InputError), full_precision():
        raise InputError("no")
    assert torch.get_float32_matmul_precision() == users_setting
    inside, seen = Barrier(2), []

    def compute(last: bool) -> None:
        with full_precision():
            inside.wait()
            if last:
                # The other one is gone, or going.
                threads[0].join()
            seen.append(torch.backends.cuda.matmul.fp32_precision)

    threads = [Thread(target=compute, args=(last,)) for last in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["ieee", "ieee"]
    assert torch.get_float32_matmul_precision() == users_setting
