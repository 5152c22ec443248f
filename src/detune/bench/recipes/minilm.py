"""A real sentence encoder, all-MiniLM-L6-v2, and fifteen LoRAs of it, each for one subject.

The base and the training are those of the demonstration. No subset of the published benchmark is like it: a model that
people use, small enough to train fifteen adapters in minutes.
"""

import csv
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Self

from detune.bench.recipes.base import THREADS
from detune.demo.texts import DOMAINS, passages
from detune.errors import InputError

__all__ = ["MiniLM"]

_HALVES = (1, 2)
_HELD_OUT = 4  # passages from the end of each domain: 32 prompts in all
_TASKS = tuple(f"{domain}-{half}" for domain in DOMAINS for half in _HALVES)[:15]


@dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2, and a LoRA on query and value of its six layers for each half of a domain of texts.

    Attributes:
        rank: LoRA rank r.
        alpha: The change is `alpha / rank · B A`.
        steps: Updates of each LoRA, of 8 passages each.
        lr: Learning rate at the first step.
        threads: CPU threads to train on.
    """

    name: ClassVar[str] = "minilm"
    stands_for: ClassVar[str | None] = None
    about: ClassVar[str] = "all-MiniLM-L6-v2, a sentence encoder; fifteen collections of passages from Python's texts"
    layers: ClassVar[int] = 12

    rank: int = 16
    alpha: int = 32
    steps: int = 60
    lr: float = 1e-3
    threads: int = THREADS

    @classmethod
    def quick(cls) -> Self:
        """A quick recipe: two steps of training on one thread; see `Recipe.quick`."""
        return cls(steps=2, threads=1)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the fifteen tasks: a domain and which half of it."""
        return _TASKS

    def make_base(self, out: Path) -> None:
        """Copy the encoder with its tokenizer; see `Recipe.make_base`.

        Args:
            out: The directory to fill.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune.demo.train import base_model

        shutil.copytree(base_model(), out)

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        """Train a LoRA to tell the second half of a passage by its first; see `Recipe.train_adapter`.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill: PEFT's adapter, and the loss of each step in `losses.json`.
            rank: LoRA rank.
            seed: For the initial A, the order of the passages and dropout.

        Raises:
            InputError: The task is unknown.
            DetuneError: The extra `bench` is not installed.
        """
        texts = self.texts(task)
        from detune.demo.train import train_lora

        train_lora(
            base,
            texts,
            out,
            rank=rank,
            alpha=self.alpha * rank // self.rank,
            steps=self.steps,
            lr=self.lr,
            seed=seed,
            threads=self.threads,
        )
        _forget_machine(out, self.name)

    def texts(self, task: str) -> list[str]:
        """Return the passages of a task: every other one of its domain, but for those held out.

        Args:
            task: One of `tasks`.

        Returns:
            Some hundreds of passages.

        Raises:
            InputError: The task is unknown.
        """
        if task not in self.tasks:
            raise InputError(f"{self.name} has no task {task!r}", f"expected one of {', '.join(self.tasks)}")
        domain, _, half = task.rpartition("-")
        return list(_passages(domain)[:-_HELD_OUT][int(half) - 1 :: len(_HALVES)])

    def write_inputs(self, out: Path) -> None:
        """Write passages of every domain that no task trains on; see `Recipe.write_inputs`.

        Args:
            out: An existing directory, for `prompts.csv`.
        """
        with (out / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["prompt"])
            rows.writerows([text] for domain in DOMAINS for text in _passages(domain)[-_HELD_OUT:])


@cache
def _passages(domain: str) -> tuple[str, ...]:
    """Parse each domain once: it takes a second, and every domain is asked for by two tasks."""
    return tuple(passages(domain))


def _forget_machine(adapter: Path, base: str) -> None:
    """Take out of an adapter where its base lay when it was trained, and order what PEFT keeps in a set."""
    (adapter / "README.md").unlink()  # a card without content, but with that path
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
