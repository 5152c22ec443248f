"""Building a recipe: what is made, what is kept, how it goes on. The recipes themselves have tests of their own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from detune.bench.recipes import RECIPES, build_recipe, find_recipe
from detune.bench.subsets import PUBLISHED
from detune.errors import InputError, OutputError
from tests.bench.conftest import save_lora, small_bert


@dataclass(frozen=True)
class Plain:
    """A recipe that draws its adapters at random, and notes what it was asked for."""

    name: ClassVar[str] = "plain"
    stands_for: ClassVar[str | None] = "vit"
    about: ClassVar[str] = "a small BERT."
    log: Path
    rank: int = 2
    alpha: int = 6
    fails_at: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"task-{i}" for i in range(15))

    def make_base(self, out: Path) -> None:
        self._note("base")
        small_bert().save_pretrained(out)

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        if task == self.fails_at and not self._noted(f"{task} failed"):
            self._note(f"{task} failed")
            out.mkdir()
            raise KeyboardInterrupt
        self._note(f"{task} rank {rank} seed {seed}")
        save_lora(out, seed=int(task.partition("-")[2]), rank=rank)

    def write_inputs(self, out: Path) -> None:
        (out / "prompts.csv").write_text("prompt\nhello\n")

    def _note(self, what: str) -> None:
        self.log.write_text((self.log.read_text() if self.log.exists() else "") + what + "\n")

    def _noted(self, what: str) -> bool:
        return self.log.exists() and what in self.log.read_text().splitlines()


def test_a_recipe_becomes_a_subset_that_is_whole(tmp_path):
    starts, told = [], []
    subset = build_recipe(
        Plain(tmp_path / "log"),
        tmp_path / "out",
        on_start=starts.append,
        on_part=lambda name, became: told.append((name, became)),
    )
    assert (subset.name, subset.stands_for, subset.rows) == ("plain", "vit", 4)
    assert subset.base == tmp_path / "out" / "base"
    assert subset.inputs == tmp_path / "out" / "inputs"
    assert len(subset.first().loras) == 15
    assert subset.first().base == "plain/base"
    parts = ["base", *(f"task-{i}" for i in range(15)), "inputs", "rows"]
    assert starts == [dict.fromkeys(parts, 1)]
    assert told == [(part, became) for part in parts for became in (None, True)]
    assert "rank 2 seed 0" in (tmp_path / "log").read_text().splitlines()[1]


def test_a_killed_build_goes_on_with_the_adapter_it_was_at(tmp_path):
    recipe = Plain(tmp_path / "log", fails_at="task-5")
    with pytest.raises(KeyboardInterrupt):
        build_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "adapters" / "task-5").exists()
    starts = []
    build_recipe(recipe, tmp_path / "out", on_start=starts.append)
    assert list(starts[0]) == [*(f"task-{i}" for i in range(5, 15)), "inputs", "rows"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 1 + 15 + 1


def test_seeds_and_ranks_go_to_the_adapters_and_into_the_name(tmp_path):
    subset = build_recipe(Plain(tmp_path / "log"), tmp_path / "out", seeds="different", seed=3, ranks=(1, 4))
    lines = (tmp_path / "log").read_text().splitlines()[1:]
    assert lines[:3] == ["task-0 rank 1 seed 3", "task-1 rank 4 seed 4", "task-2 rank 1 seed 5"]
    assert subset.name == "plain-different-seeds-r1-4"
    assert [lora.rank for lora in subset.first().loras[:3]] == [1, 4, 1]
    again = build_recipe(
        Plain(tmp_path / "log"), tmp_path / "out", seeds="different", seed=3, ranks=(1, 4), name="mine"
    )
    assert again.name == "mine"


def test_a_rank_of_zero_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match=r"no LoRA has rank 0; expected positive numbers"):
        build_recipe(Plain(tmp_path / "log"), tmp_path / "out", ranks=(2, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_build_is_kept_to_the_byte(tmp_path):
    recipe = Plain(tmp_path / "log")
    first = build_recipe(recipe, tmp_path / "out").fingerprint
    (file,) = (tmp_path / "out").glob("data/*.parquet")
    before = file.stat().st_mtime_ns
    assert build_recipe(recipe, tmp_path / "out").fingerprint == first
    assert file.stat().st_mtime_ns == before


def test_another_build_in_the_same_place_is_refused(tmp_path):
    build_recipe(Plain(tmp_path / "log"), tmp_path / "out")
    with pytest.raises(OutputError, match=r"out holds another build; it was made by Plain.*seed=0.*expected .*seed=1"):
        build_recipe(Plain(tmp_path / "log"), tmp_path / "out", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"mine is not empty; and holds no build to go on with"):
        build_recipe(Plain(tmp_path / "log"), tmp_path / "mine")


def test_the_card_says_what_it_is(tmp_path):
    build_recipe(Plain(tmp_path / "log"), tmp_path / "out")
    card = json.loads((tmp_path / "out" / "subset.json").read_text())
    assert card["layers"] == 4
    assert card["ranks"] == [2]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "config_name: plain" in text
    assert "a small BERT." in text


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_says_what_it_is(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.stands_for is None or recipe.rank == PUBLISHED[recipe.stands_for].rank
    assert len(set(recipe.tasks)) == len(set(find_recipe(name, quick=True).tasks)) == 15


def test_an_unknown_recipe_gets_a_suggestion():
    with pytest.raises(InputError, match=r"no recipe 'vit'; expected one of vit-mini, .*did you mean 'vit-mini'\?"):
        find_recipe("vit")
