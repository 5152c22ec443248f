"""Three tiny fine-tunes of one base, and whether the base came back: `smoke.py make|check DIR`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def make(folder: Path) -> None:
    """Write base.safetensors and model-{0,1,2}.safetensors: rank-2 changes of one 64×48 matrix."""
    generator = torch.Generator().manual_seed(0)
    W_star = torch.randn(64, 48, generator=generator)
    bias = torch.randn(64, generator=generator)
    save_file({"layer.weight": W_star, "layer.bias": bias}, folder / "base.safetensors")
    for i in range(3):
        B = torch.randn(64, 2, generator=generator)
        A = torch.randn(2, 48, generator=generator)
        save_file({"layer.weight": W_star + 0.1 * B @ A, "layer.bias": bias}, folder / f"model-{i}.safetensors")


def check(folder: Path) -> None:
    """Compare what was recovered with the base."""
    (written,) = (folder / "recovered").glob("*.safetensors")
    got, want = load_file(written), load_file(folder / "base.safetensors")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    print("recovered: largest error", (got["layer.weight"] - want["layer.weight"]).abs().max().item())


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
