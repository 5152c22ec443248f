"""Sets as people publish them, against the plain form of the same set: W-Error, verdict and time.

Three LoRAs of one seed on all-MiniLM-L6-v2, merged in float32 (five where 4 bits are told from the rest), and each
form made of them. K quants and mixed dtypes are of SmolLM2's matrices, see `forms_of_llm.py`. Expected: every form that
loses nothing within 0.3 of the form it is held against, in at most 1.1 times its processor time; 8 bits at least 0.5
better than the average of the dequantised models, the others no worse than that. Training the adapters takes some
minutes, fewer with `--steps`; they are kept in `benchmarks/.cache`.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import forms_of_llm
import numpy as np
import torch
from problems import verdict
from safetensors.torch import load_file, save_file
from torch import Tensor

import detune
from detune._runtime import quiet
from detune.checkpoints import open_checkpoint
from detune.compatibility.quantisation_levels import to_nf4
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import STEPS, base_model, merge, train_lora
from detune.metrics import w_error

State = dict[str, Tensor]
EMBED, POOLER = "embeddings.word_embeddings.weight", "pooler.dense.weight"
CHANGED = ("query.weight", "value.weight")
CACHE = Path(__file__).parent / ".cache"


def merged_models(count: int) -> list[Path]:
    """The first of the demo's fine-tunes, trained once for each number of steps."""
    folder = CACHE / f"forms-{steps()}"
    paths = []
    for domain in list(DOMAINS)[:count]:
        path = folder / f"merged-{domain}"
        if not (path / "config.json").is_file():
            adapter = train_lora(base_model(), passages(domain), folder / f"adapter-{domain}", steps=steps(), threads=1)
            merge(base_model(), adapter, path)
        paths.append(path)
    return paths


@cache
def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def steps() -> int:
    return options().steps


def save(path: Path, state: State) -> Path:
    path.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors", {"format": "pt"}
    )
    shutil.copy(merged_models(1)[0] / "config.json", path)
    return path


def states(count: int) -> list[State]:
    return [load_file(path / "model.safetensors") for path in merged_models(count)]


def each(change: Callable[[State, int], State], count: int = 3) -> Callable[[Path], list[Path]]:
    """A set of directories, each model changed by its place."""

    def make(folder: Path) -> list[Path]:
        return [save(folder / f"{i}", change(dict(state), i)) for i, state in enumerate(states(count))]

    return make


def tokens(*counts: int) -> Callable[[State, int], State]:
    """More rows in the embedding."""

    def change(state: State, i: int) -> State:
        more = 0.05 * torch.randn(counts[i], state[EMBED].shape[1], generator=torch.Generator().manual_seed(i))
        return state | {EMBED: torch.cat([state[EMBED], more])}

    return change


def trained_tokens(state: State, i: int) -> State:
    """PEFT's `modules_to_save`: every model has trained some rows of its own; one has two tokens more."""
    embed = state[EMBED].clone()
    embed[1000 * i + 100 : 1000 * i + 600] += 0.01 * torch.randn(500, embed.shape[1], generator=torch.Generator())
    return tokens(0, 2, 0)(state | {EMBED: embed}, i)


def tied(state: State, i: int) -> State:
    return state | {"cls.predictions.decoder.weight": state[EMBED].clone()} if i == 1 else state


def without_pooler(state: State, i: int) -> State:
    return {name: tensor for name, tensor in state.items() if i != 1 or "pooler" not in name}


def prefixed(*prefixes: str) -> Callable[[State, int], State]:
    return lambda state, i: {prefixes[i] + name: tensor for name, tensor in state.items()}


def half(quantise: Callable[[Tensor], Tensor]) -> Callable[[State, int], State]:
    """Matrices quantised and turned back into fp16."""

    def change(state: State, i: int) -> State:
        return {name: quantise(t).half() if is_matrix(name) else t.half() for name, t in state.items()}

    return change


def is_matrix(name: str) -> bool:
    return name.endswith("weight") and ("encoder.layer" in name or "pooler" in name) and "LayerNorm" not in name


def by_rows(matrix: Tensor) -> Tensor:
    scale = matrix.abs().amax(dim=1, keepdim=True) / 127
    return (matrix / scale).round() * scale


def by_blocks(matrix: Tensor) -> Tensor:
    return by_rows(matrix.reshape(-1, 32)).view(matrix.shape)


def fp8(rows: int | None, columns: int | None) -> Callable[[State, int], State]:
    """e4m3 with a scale beside for each block of rows and columns; None is all."""

    def change(state: State, i: int) -> State:
        stored: State = {}
        for name, tensor in state.items():
            if is_matrix(name):
                high, wide = rows or len(tensor), columns or tensor.shape[1]
                blocks = tensor.view(len(tensor) // high, high, tensor.shape[1] // wide, wide)
                scale = blocks.abs().amax(dim=(1, 3)) / 448
                codes = (blocks / scale[:, None, :, None]).view(tensor.shape).to(torch.float8_e4m3fn)
                stored |= {name: codes, f"{name}_scale": scale}
            else:
                stored[name] = tensor.bfloat16()
        return stored

    return change


def gguf_files(kind: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        import gguf

        paths = []
        for i, state in enumerate(states(3)):
            path = folder / f"{i}.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = gguf.GGUFWriter(path, "bert")
            for name, tensor in state.items():
                if tensor.is_floating_point():
                    own = gguf.GGMLQuantizationType[kind if is_matrix(name) else "F32"]
                    values = tensor.numpy().astype(np.float32)
                    writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            paths.append(path)
        return paths

    return make


def training(legacy: bool) -> Callable[[Path], list[Path]]:
    """Lightning's checkpoints, or files of torch before 1.6."""

    def make(folder: Path) -> list[Path]:
        folder.mkdir(parents=True)
        for i, state in enumerate(states(3)):
            saved: Any = (
                state
                if legacy
                else {
                    "epoch": 1,
                    "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
                    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
                    "hyper_parameters": {"lr": 0.1, "sizes": [1, 2]},
                }
            )
            torch.save(saved, folder / f"{i}.ckpt", _use_new_zipfile_serialization=not legacy)
        return [folder / f"{i}.ckpt" for i in range(3)]

    return make


def in_four_bits(state: State, i: int) -> State:
    """Merge the last two of five onto what 4 bits leave of the base, as QLoRA does."""
    if i < 3:
        return state
    with open_checkpoint(base_model()) as base:
        own = {name: base.read(name) for name in state if is_matrix(name)}
    return state | {name: (to_nf4(W) + (state[name] - W)).float() for name, W in own.items()}


def unmerged(folder: Path) -> list[Path]:
    from peft import PeftModel
    from transformers import AutoModel

    adapter = next(merged_models(1)[0].parent.glob("adapter-*"))
    with quiet():
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base_model(), dtype=torch.float32), adapter)
    return [save(folder / "0", {name: tensor.clone() for name, tensor in model.state_dict().items()})]


def stacked(folder: Path, as_stack: bool) -> list[Path]:
    """The twelve queries and values as the experts of two mixtures, one of which the second model never trained."""
    with open_checkpoint(base_model()) as base:
        own = {name: base.read(name) for name in base.tensors if name.endswith(CHANGED)}
    paths = []
    for i, state in enumerate(states(3)):
        kept = {name: tensor for name, tensor in state.items() if name not in own}
        for kind in CHANGED:
            names = [name for name in own if name.endswith(kind)]
            matrices = [own[name] if (i, k) == (1, 2) else state[name] for k, name in enumerate(names)]
            stack = {f"experts.{kind.partition('.')[0]}_proj": torch.stack(matrices)}
            kept |= stack if as_stack else dict(zip(names, matrices, strict=True))
        paths.append(save(folder / f"{i}", kept))
    return paths


def changed_matrices() -> State:
    """The base's, of those that the LoRAs change."""
    with open_checkpoint(base_model()) as base:
        return {name: base.read(name) for name in base.tensors if name.endswith(CHANGED)}


# Storing an answer in bf16 moves it by less than this.
STORED = 0.01


@dataclass(frozen=True)
class Row:
    """A form.

    Attributes:
        make: Writes the models below a directory.
        gain: How much of W-Error is to be gained over the average of the models; None where nothing is lost against
            the reference.
        reference: The plain form, whose time and W-Error it is held against.
        truth: The base's matrices that are compared.
    """

    make: Callable[[Path], list[Path]]
    gain: float | None = None
    reference: str = "plain"
    truth: Callable[[], State] = changed_matrices


ROWS = {
    "plain": Row(each(lambda state, i: state)),
    "2 tokens more in one": Row(each(tokens(0, 0, 2))),
    "2 tokens more in the first": Row(each(tokens(2, 0, 0))),
    "1, 2 and 8 tokens more": Row(each(tokens(1, 2, 8))),
    "trained embeddings beside": Row(each(trained_tokens)),
    "a tied head saved in one": Row(each(tied)),
    "one lacks the pooler": Row(each(without_pooler)),
    "module. in one": Row(each(prefixed("", "module.", ""))),
    "three prefixes": Row(each(prefixed("_orig_mod.", "bert.", "base_model.model."))),
    "not merged, one model": Row(unmerged),
    "a stack of experts": Row(lambda folder: stacked(folder, True)),
    "Lightning's .ckpt": Row(training(False)),
    "torch before 1.6": Row(training(True)),
    "five": Row(each(lambda state, i: state, 5), reference="five"),
    "three, and two in 4 bits": Row(each(in_four_bits, 5), reference="five"),
    "GGUF F32": Row(gguf_files("F32")),
    "GGUF Q8_0": Row(gguf_files("Q8_0"), 0.5),
    "GGUF Q4_0": Row(gguf_files("Q4_0"), -STORED),
    "fp8, a scale a tensor": Row(each(fp8(None, None)), -STORED),
    "fp8, a scale a channel": Row(each(fp8(1, None)), -STORED),
    "fp8, a scale a block": Row(each(fp8(128, 128)), -STORED),
    "Q8_0 in fp16 again": Row(each(half(by_blocks)), 0.5),
    "int8 in fp16 again": Row(each(half(by_rows)), 0.5),
    "NF4 in fp16 again": Row(each(half(to_nf4)), -STORED),
    **{
        name: Row(form.make, -STORED if form.is_lossy else None, form.reference, form.truth)
        for name, form in forms_of_llm.FORMS.items()
    },
}


def main() -> None:
    torch.set_num_threads(1)
    chosen = options().only
    known: dict[str, Figures] = {}
    print(f"{'form':28} {'plain':>7} {'average':>8} {'W-Error':>8} {'predicted':>10} {'verdict':>22} {'time':>6}")
    with tempfile.TemporaryDirectory() as folder:
        # Not timed: the first run imports and compiles.
        run(Path(folder), ROWS[chosen[0]].reference)
        for name in chosen:
            row = ROWS[name]
            for each_name in (row.reference, name):
                if each_name not in known:
                    known[each_name] = run(Path(folder), each_name)
            reference, figures = known[row.reference], known[name]
            times = figures.seconds / reference.seconds
            print(
                f"{name:28} {reference.error:7.2f} {figures.average:8.2f} {figures.error:8.2f} "
                f"{figures.predicted:10.2f} {figures.verdict:>22} {times:6.2f}"
            )
            if row.gain is None:
                print("  ", verdict("worse than the plain form by", figures.error - reference.error, 0.3))
            else:
                print("  ", verdict("worse than the average by", figures.error - figures.average, -row.gain))
            print("  ", verdict("times the plain form's time", times, 1.1), flush=True)
            if name in forms_of_llm.FORMS:
                print(f"   in the range that was said: {figures.in_range} of {figures.with_range} matrices", flush=True)


class Figures:
    """What came out: mean W-Errors of the recovered weights and of the average, what was said of them, and the time."""

    def __init__(self, paths: Sequence[Path], out: Path, report: Any, truth: State, seconds: float) -> None:
        self.seconds = seconds
        with open_checkpoint(next(out.glob("*.safetensors"))) as found:
            values = by_name(found, truth)
        stacks = []
        for path in paths:
            with open_checkpoint(path) as model:
                stacks.append(by_name(model, truth))
        self.error = mean_error(values, truth)
        self.average = mean_error({n: torch.stack([s[n].double() for s in stacks]).mean(dim=0) for n in truth}, truth)
        rows = [row for row in report.tensors if row.method not in ("copy", "mean", "single")]
        predicted = [row.predicted_w_error for row in rows if row.predicted_w_error is not None]
        self.predicted = fmean(predicted) if predicted else -math.inf
        self.verdict = max({row.verdict for row in rows}, key=[row.verdict for row in rows].count) if rows else "exact"
        ends = {row.name: (row.best_w_error, row.worst_w_error) for row in rows if row.worst_w_error is not None}
        said = [(w_error(values[name], truth[name]), *ends[name]) for name in truth if name in ends]
        self.with_range = len(said)
        self.in_range = sum((low is None or low <= error) and error <= high for error, low, high in said)


def mean_error(values: State, truth: State) -> float:
    return fmean(max(w_error(values[name], W), -40.0) for name, W in truth.items())


def by_name(model: Any, truth: State) -> State:
    """The matrices by the base's names, whatever the form calls them."""
    found: State = {}
    for kind in CHANGED:
        stack = f"experts.{kind.partition('.')[0]}_proj"
        if stack in model.tensors:
            found |= dict(zip([name for name in truth if name.endswith(kind)], model.read(stack), strict=True))
    for name in truth:
        own = next((own for own in model.tensors if own.endswith(name)), None)
        if own is not None:
            found[name] = model.read(own)
    return found


def run(folder: Path, name: str) -> Figures:
    """The figures of a form, with the median processor time of some runs."""
    paths = ROWS[name].make(folder / name)
    times = []
    for k in range(options().repeats):
        out = folder / f"{name}-out-{k}"
        began = time.process_time()
        report = detune.recover(paths, out)
        times.append(time.process_time() - began)
    figures = Figures(paths, out, report, ROWS[name].truth(), median(times))
    for made in folder.iterdir():
        shutil.rmtree(made)
    return figures


if __name__ == "__main__":
    main()
