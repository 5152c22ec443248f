"""How much of three models on the Hub do `inspect` and `family` fetch? Measured on a Hub on this machine, and counted
for large models from the shapes of their tensors.

Measured: three fine-tunes of all-MiniLM-L6-v2 with random LoRAs of rank 8 in queries and values. Its matrices have 384
rows and more, so 128 are looked at beside the usual 1024. `recover` needs all of them; what it downloads stays in the
cache of the client. What a part says is compared with what the whole says on three trained LoRAs of one seed, whose
row spaces nearly coincide.

Expected: at most a quarter of a 7B model.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from minilm import merged_models
from problems import verdict
from safetensors.torch import load_file, save_file

from detune.certificate.verdict import Verdict
from detune.demo.train import base_model

ROWS = (128, 1024)


@dataclass(frozen=True)
class Architecture:
    """A decoder as its configuration tells it: sizes of the hidden state, of keys, and of the MLP."""

    name: str
    hidden: int
    keys: int
    mlp: int
    layers: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every tensor."""
        h, k, m = self.hidden, self.keys, self.mlp
        layer = [(h, h), (k, h), (k, h), (h, h), (m, h), (m, h), (h, m), (h,), (h,)]
        return layer * self.layers + [(self.vocabulary, h), (h,), (self.vocabulary, h)]


LARGE = (
    Architecture("Mistral-7B", 4096, 1024, 14336, 32, 32000),
    Architecture("Llama-3.1-8B", 4096, 1024, 14336, 32, 128256),
    Architecture("Llama-3.1-70B", 8192, 1024, 28672, 80, 128256),
    Architecture("Llama-3.1-405B", 16384, 1024, 53248, 126, 128256),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))
    print()
    compare()
    print()
    share = count()
    print(verdict("share of Mistral-7B", share, 0.25))


def measure(folder: Path) -> None:
    """Serve three models, and count the bytes that the command makes the server send."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.hub_server import Hub, serving

    names = [f"org/model-{i}" for i in range(3)]
    for seed, name in enumerate(names):
        fine_tune(folder / "repositories" / name, seed)
    hub = Hub(folder / "repositories")
    with serving(hub) as address:
        # Read when the client is imported.
        os.environ |= {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(folder / "cache")}
        os.environ.pop("HF_HUB_OFFLINE", None)
        import detune

        total = sum(path.stat().st_size for path in (folder / "repositories").rglob("*.safetensors"))
        print(f"three all-MiniLM-L6-v2, {total / 1e6:.1f} MB")
        print(f"{'':26} {'MB sent':>8} {'of all':>7} {'requests':>9}  ranks found")
        for rows in ROWS:
            for verb in (detune.inspect, detune.check_family):
                hub.sent.clear()
                hub.requests.clear()
                rows_found = verb(names, rows=rows).tensors
                ranks = sorted({rank for row in rows_found for rank in row.ranks})
                print(
                    f"{verb.__name__ + f', {rows} rows':26} {hub.sent_bytes / 1e6:8.1f} "
                    f"{100 * hub.sent_bytes / total:6.1f}% {sum(hub.requests.values()):9}  {ranks}"
                )


def compare() -> None:
    """Print what is found in some rows and in all."""
    import detune

    print("three all-MiniLM-L6-v2 with trained LoRAs of one seed, r=16, float32")
    print(f"{'rows':>5} {'ranks found':>12} {'to the storage floor':>21} {'predicted W-Error':>18}")
    for rows in (128, 192, 256, "all"):
        report = detune.inspect(merged_models(3), rows=rows)
        ranks = sorted({rank for row in report.tensors for rank in row.ranks})
        predicted = report.summary["mean_predicted_w_error"]
        print(f"{rows:>5} {ranks!s:>12} {report.counts.get(Verdict.FLOOR, 0):21} {predicted:18.2f}")


def fine_tune(path: Path, seed: int) -> None:
    """Save the base with random LoRAs merged in."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(base_model(), path, ignore=shutil.ignore_patterns("*.bin", "onnx", "openvino"))
    (weights,) = path.glob("model.safetensors")
    state = load_file(weights)
    for name, W in state.items():
        if name.endswith(("query.weight", "value.weight")):
            B, A = (torch.randn(len(W), 8, generator=generator) for _ in range(2))
            state[name] = W + 0.002 * B @ A.mT
    save_file(state, weights, metadata={"format": "pt"})


def count() -> float:
    """Print the share of large models that 1024 rows of each matrix are; returns the first."""
    rows = ROWS[-1]
    print(f"bf16, {rows} rows of each matrix, vectors whole, three models")
    print(f"{'':16} {'GB in all':>9} {'GB read':>8} {'of all':>7}")
    shares = []
    for model in LARGE:
        whole = read = 0
        for shape in model.shapes():
            row_bytes = 2 * (shape[1] if len(shape) > 1 else 1)
            whole += 3 * shape[0] * row_bytes
            read += 3 * (min(rows, shape[0]) if len(shape) > 1 else shape[0]) * row_bytes
        shares.append(read / whole)
        print(f"{model.name:16} {whole / 1e9:9.1f} {read / 1e9:8.1f} {100 * shares[-1]:6.1f}%")
    return shares[0]


if __name__ == "__main__":
    main()
