"""The commands that write, what each makes, and the models they are run on."""

from dataclasses import dataclass, replace
from pathlib import Path

from tests.cases import normal, seeded
from tests.families import State, add, delta, save_plain, shard

__all__ = ["COMMANDS", "Command", "make_models"]


@dataclass(frozen=True)
class Command:
    """A command, in a directory of its own.

    Attributes:
        words: Its arguments.
        makes: What it makes there, and nothing else.
        begins: Commands that have been run there before.
        resumes: Whether what it has done when it is cut off is of use to it.
        code: What it exits with when it is done.
        exchanges: Whether it runs on a file system that can exchange two names in one step.
    """

    words: tuple[str, ...]
    makes: tuple[str, ...]
    begins: tuple[tuple[str, ...], ...] = ()
    resumes: bool = False
    code: int = 0
    exchanges: bool = True


MODELS = ("../models/model-0", "../models/model-1", "../models/model-2")
RECOVER = ("recover", *MODELS, "--out", "out", "--dtype", "bfloat16")
OVERWRITE = Command(
    (*RECOVER, "--overwrite"), ("out",), (("recover", *MODELS, "--out", "out", "--method", "mean"),), resumes=True
)
COMMANDS = {
    "recover": Command((*RECOVER, "--adapters", "ad", "--mask", "m.npz"), ("out", "ad", "m.npz"), resumes=True),
    "overwrite": OVERWRITE,
    "overwrite-in-two-steps": replace(OVERWRITE, exchanges=False),
    "extract": Command(("extract", *MODELS, "--base", "../models/base", "--out", "ad"), ("ad",)),
    "pack": Command(("pack", *MODELS, "--out", "pack"), ("pack",)),
    "unpack": Command(("unpack", "pack", "--out", "un"), ("pack", "un"), (("pack", *MODELS, "--out", "pack"),)),
    "audit": Command(("audit", *MODELS, "--base", "../models/base", "--out", "audit"), ("audit",), code=1),
    "defend": Command(("defend", "bf16", MODELS[0], "release"), ("release",)),
}


def make_models(folder: Path) -> None:
    """A bf16 base that float32 merges give away to the bit, each in two shards, with files that travel along."""
    generator = seeded(3)
    base = {f"layer.{i}.weight": normal(generator, 48, 40).bfloat16().float() for i in range(2)}
    base |= {"embed.weight": normal(generator, 8, 40).bfloat16().float()}
    base |= {"norm.weight": normal(generator, 40).bfloat16().float()}
    for i in range(3):
        changed = {name: add(base[name], delta(generator, base[name], 2)) for name in base if "layer" in name}
        save(folder / f"model-{i}", base | changed)
    save(folder / "base", base)


def save(path: Path, state: State) -> None:
    save_plain(path, state)
    shard(path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "merges.txt").write_text("a b\n" * 100)
