"""The runner: methods × numbers of models × draws of the LoRAs, over the rows of one subset.

Rows are read once, whatever the number of cells: the outer loop is over layers, so a subset is streamed and one layer
is in memory at a time. What is done is kept layer by layer; a run that is killed goes on where it was.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from detune._runtime import OnPart, OnStart, telling
from detune.bench.behaviour import Behaviour, Differences, Metric, behaviour_of
from detune.bench.layers import Layer
from detune.bench.merging import tensor_name, write_with
from detune.bench.methods import Method
from detune.bench.results import Cell, CellResult, Environment, LayerResult, ResultStore
from detune.bench.subsets import Subset
from detune.checkpoints import PrivatePaths, open_checkpoint, temporary_directory
from detune.errors import InputError
from detune.methods import Mean
from detune.metrics import bit_identical, squared_error
from detune.numerics.device import full_precision
from detune.problem import NotRecoverable, Stack
from detune.problem.stack import matricise

__all__ = ["Judge", "Task", "draw", "plan", "run", "run_all", "solve_layer"]

USUAL_MODELS = (3, 5, 8)


@dataclass(frozen=True)
class Task:
    """A cell with the method that fills it."""

    cell: Cell
    method: Method


@dataclass(frozen=True)
class Judge:
    """Compares what recovered models do with what the original does.

    Attributes:
        base: The original's checkpoint.
        behaviour: What it is run on.
        inputs_sha256: Over the files of the inputs.
    """

    base: Path
    behaviour: Behaviour[Any]
    inputs_sha256: str = ""

    @classmethod
    def of(cls, base: Path, inputs: Path | None) -> "Judge":
        """A judge for a base; see `detune.bench.behaviour.behaviour_of`."""
        return cls(base, behaviour_of(base, inputs), _hash_inputs(inputs))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the original's weights and the inputs."""
        with open_checkpoint(self.base) as base:
            hashes = base.hashes()
        content = json.dumps([hashes, self.inputs_sha256], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _original(self) -> Any:
        return self.behaviour.observe(self.base)

    def compare(self, recovered: Path) -> Differences:
        """The differences of a recovered model's behaviour; the original is observed once."""
        return self.behaviour.compare(self._original, self.behaviour.observe(recovered))


def plan(
    subset: Subset,
    methods: Sequence[Method],
    models: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    *,
    rank_known: bool = True,
) -> list[Task]:
    """Lay out the cells of a run.

    Numbers of models that are too few for a method are left out where others are not.

    Args:
        subset: The rows.
        methods: What to compare.
        models: Numbers of models; empty for 3, 5 and 8, as far as there are LoRAs.
        seeds: Draws of the LoRAs.
        rank_known: Whether methods are told the largest rank of each layer, as in the paper.

    Raises:
        InputError: More models are asked for than the subset has LoRAs, fewer than one, or for a method none that are
            enough.
    """
    total = len(subset.first().loras)
    models = models or [n for n in USUAL_MODELS if n <= total] or [total]
    for n in models:
        if not 1 <= n <= total:
            raise InputError(f"{n} models asked for", f"{subset.source} has {total} LoRAs", f"ask for 1 to {total}")
    for method in methods:
        if max(models) < method.min_models:
            raise InputError(
                f"{method.name} needs at least {method.min_models} models",
                f"asked for {', '.join(map(str, models))}",
                f"leave it out, or give --models {method.min_models}",
            )
    return [
        Task(
            Cell(
                subset=subset.name,
                fingerprint=subset.fingerprint,
                stands_for=subset.stands_for,
                method=method.name,
                settings=method.settings,
                method_sha256=method.sha256,
                loras=draw(total, n, seed),
                seed=seed,
                rank_known=rank_known,
            ),
            method,
        )
        for method in methods
        for n in models
        for seed in seeds
        if n >= method.min_models
    ]


def draw(total: int, n: int, seed: int) -> tuple[int, ...]:
    """The LoRAs that a seed picks: more of them with the same seed only adds some."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return tuple(sorted(order[:n]))


def run_all(
    subset: Subset,
    tasks: Sequence[Task],
    store: ResultStore,
    *,
    base: Path | None = None,
    inputs: Path | None = None,
    behave: bool = True,
    device: torch.device | str = "cpu",
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> list[CellResult]:
    """Fill the cells, and compare behaviour where there is a base to run.

    Args:
        subset: The rows.
        tasks: What `plan` laid out.
        store: Where results are kept.
        base: The original model's directory; None takes the one beside the rows, if there is one.
        inputs: What models are run on; None takes what lies beside the rows.
        behave: Whether to run models at all.
        device: Where the solvers compute.
        on_start: For progress, see `run`.
        on_part: See `run`.

    Raises:
        InputError: As `run`; or the base cannot be run on the inputs.
    """
    base = base or subset.base
    if not behave or base is None:
        why = "models were not run" if not behave else "no base at hand"
        if inputs is not None:
            raise InputError(f"inputs {inputs} are given, but {why}", "expected a base to run on them", "give --base")
        return run(subset, tasks, store, unjudged=why, device=device, on_start=on_start, on_part=on_part)
    judge = Judge.of(base, inputs or subset.inputs)
    return run(subset, tasks, store, judge=judge, device=device, on_start=on_start, on_part=on_part)


def run(
    subset: Subset,
    tasks: Sequence[Task],
    store: ResultStore,
    *,
    judge: Judge | None = None,
    unjudged: str = "no base at hand",
    device: torch.device | str = "cpu",
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> list[CellResult]:
    """Fill the cells that are not finished yet.

    Args:
        subset: The rows.
        tasks: What `plan` laid out.
        store: Where results are kept.
        judge: Runs the recovered models too; None leaves behaviour out.
        unjudged: Without a judge: why there is none.
        device: Where the solvers compute.
        on_start: For progress: called with the layers that are still to be solved for each cell, where their number is
            known, then with the models that are run.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        The result of every cell, in the order of the tasks.

    Raises:
        InputError: A row is damaged, or a method of the user's fails; both are named.
    """
    digest = judge.digest if judge else None
    unfinished = {task.cell.name: task for task in tasks if not store.is_finished(task.cell, digest)}
    todo = tuple(unfinished.values())  # each once, whoever asks for it twice
    if todo:
        environment = Environment.now(str(device))  # of the code that runs, whatever becomes of its files meanwhile
        names: dict[int, str] = {}
        with ExitStack() as stack:
            base = stack.enter_context(open_checkpoint(judge.base)) if judge else None
            for task in todo:
                stack.enter_context(store.claim(task.cell, environment))
            if on_start and subset.rows is not None:
                on_start(
                    {
                        f"{_told(task.cell)}, layer {index}": 1
                        for task in todo
                        for index in range(subset.rows)
                        if not store.has_layer(task.cell, index, with_weight=judge is not None)
                    },
                )
            for layer in subset.layers():
                names[layer.index] = tensor_name(layer, base) if base else layer.name
                for task in todo:
                    if store.has_layer(task.cell, layer.index, with_weight=judge is not None):
                        continue
                    with telling(on_part, f"{_told(task.cell)}, layer {layer.index}"):
                        result, weight = solve_layer(layer, task, device)
                        store.keep_layer(task.cell, result, weight if judge is not None else None)
            if on_start and judge is not None:
                on_start({f"{_told(task.cell)}, outputs": 1 for task in todo})
            for task in todo:
                with telling(on_part, f"{_told(task.cell)}, outputs"):
                    store.finish(_finish(subset, task.cell, store, judge, unjudged, names, environment))
        store.tidy()
    return [store.read(task.cell) for task in tasks]


def _told(cell: Cell) -> str:
    """A cell in words."""
    rank = "" if cell.rank_known else ", ranks found"
    return f"{cell.method} on {len(cell.loras)} models, draw {cell.seed}{rank}"


def solve_layer(layer: Layer, task: Task, device: torch.device | str = "cpu") -> tuple[LayerResult, Tensor]:
    """Merge, recover, and only then compare with the truth.

    Returns:
        The result, and the recovered weight in shape and dtype of the layer's.

    Raises:
        InputError: The method fails in a way of its own; the layer is named.
    """
    cell = task.cell
    stack = Stack.of([matricise(layer.merged(i)) for i in cell.loras], task.method.dtype, device)
    rank = layer.rank(cell.loras) if cell.rank_known else None
    failure = None
    memory = PeakMemory(torch.device(device))
    began = time.perf_counter()
    with memory.watch(), full_precision():
        try:
            recovery = task.method.solve(stack, rank)
        except NotRecoverable as why:
            failure, recovery = str(why), Mean().solve(stack)
        except InputError as error:
            raise InputError(f"{cell.method} failed in row {layer.index}, layer {layer.name!r}", str(error)) from error
        except Exception as error:
            if cell.method_sha256 is None:
                raise
            raise InputError(
                f"{cell.settings} failed in row {layer.index}, layer {layer.name!r}",
                f"{type(error).__name__}: {error}",
                "mend the method",
            ) from error
        weight = recovery.weight.to("cpu", layer.weight.dtype).reshape(layer.weight.shape)
    if not torch.isfinite(weight).all():
        raise InputError(
            f"{cell.settings} gave NaN or Inf in row {layer.index}, layer {layer.name!r}",
            f"of {weight.numel()} entries {int(torch.isfinite(weight).sum())} are finite",
            "mend the method",
        )
    result = LayerResult(
        index=layer.index,
        model=layer.model,
        name=layer.name,
        kind=layer.kind,
        depth=layer.depth,
        shape=tuple(layer.weight.shape),
        mse=squared_error(weight, layer.weight),
        bit_identical=bit_identical(weight, layer.weight),
        seconds=time.perf_counter() - began,
        peak_memory_bytes=memory.peak_bytes,
        failure=failure,
        ranks=recovery.ranks,
        noise_ratio=recovery.noise_ratio if math.isfinite(recovery.noise_ratio or 0.0) else None,
    )
    return result, weight


class PeakMemory:
    """The memory of a block of code at its highest: the GPU's by torch, the CPU's by the kernel's own mark (Linux).

    Attributes:
        peak_bytes: The memory at its highest less what it was at the start; None where it cannot be had.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes: int | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the block."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
        except OSError:
            yield
            return
        yield
        self.peak_bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"the kernel tells no {field}")


def _finish(
    subset: Subset,
    cell: Cell,
    store: ResultStore,
    judge: Judge | None,
    unjudged: str,
    names: dict[int, str],
    environment: Environment,
) -> CellResult:
    places = PrivatePaths(store.folder.resolve(), [subset.source, store.folder, *([judge.base] if judge else ())])
    layers = store.layers(cell)
    assert [layer.index for layer in layers] == list(names), "every row is there once"
    behaviour, notes = dict[Metric, float](), [f"behaviour was not compared: {unjudged}"]
    if judge is not None:
        weights = {names[layer.index]: partial(_read_weight, store.weight_file(cell, layer.index)) for layer in layers}
        # Below the results, where there is room for the weights, not in a small /tmp.
        with (
            temporary_directory("recovered", store.folder) as folder,
            open_checkpoint(judge.base) as base,
        ):
            recovered = folder / "recovered"
            write_with(base, weights, recovered)
            differences = judge.compare(recovered)
        behaviour = dict(differences.values)
        notes = [f"{metric}: {why}" for metric, why in differences.notes.items()]
    return CellResult(
        cell=cell,
        source=places.within(subset.source),
        environment=environment,
        layers=layers,
        behaviour=behaviour,
        notes=tuple(map(places.within, notes)),
        judged_on=judge.digest if judge else None,
    )


def _hash_inputs(inputs: Path | None) -> str:
    files = sorted(path for path in inputs.iterdir() if path.is_file()) if inputs and inputs.is_dir() else [inputs]
    digest = hashlib.sha256()
    for file in files:
        if file is not None and file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _read_weight(file: Path) -> Tensor:
    return load_file(file)["weight"]
