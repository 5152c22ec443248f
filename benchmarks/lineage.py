"""Trees of 10 to 30 models whose descent is known: detune's lineage beside MoTHer recovery. Two minutes on one core.

Bases are small networks of four layers, 128 to 192 wide, with columns of different size and heavy tails as trained
weights have, or Gaussian. Each model is made of one that is there: a LoRA of rank 4 to 16 merged onto it, its adapter
at another strength, a later checkpoint of its run, a copy in int8, or a full fine-tune. Updates are random, not
trained.

MoTHer recovery (Horwitz, Shul & Hoshen, ICLR 2025, arXiv 2405.18432) is written here from its abstract, from its
overview as reviews repeat it, and from memory: the paper's full text could not be read. Distances of all pairs, by the
rank of the differences for LoRAs or by their norm; a matrix K of directions from the kurtosis of the weights; a
minimum directed spanning tree (Edmonds) of D + lambda K, with lambda the mean of D. Whether kurtosis falls or grows
along an edge depends on the stage of training, which the method has to be told, as it has to be told which distance to
take: the best of the four combinations is shown, chosen by the truth. Ranks are counted over the storage noise, or all
would be full.

A tree is compared by how its edges split the models that are given, so that an edge to a hidden node counts for a
method without such nodes too, if it has one between the same models. "Directed" is the share of the right edges whose
direction is right, "s" core seconds with reading.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import networkx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detune.lineage import Lineage, find_lineage

LAYERS, WIDTHS, RANKS = 4, (128, 160, 192), (4, 8, 16)
State = dict[str, Tensor]


@dataclass
class Family:
    """Models on their way to disk, and whose child each is."""

    draw: torch.Generator
    dtype: torch.dtype
    states: list[State] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    updates: list[State] = field(default_factory=list)
    copied: set[int] = field(default_factory=set)
    rounded: set[int] = field(default_factory=set)

    def add(self, parent: int | None, state: State, update: State | None = None) -> None:
        self.states.append(state)
        self.parents.append(parent)
        self.updates.append(update or {})

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.draw))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def size(self, low: float, high: float) -> float:
        return low * math.exp(float(torch.rand((), generator=self.draw)) * math.log(high / low))

    def base(self, tails: bool) -> None:
        widths = [WIDTHS[self.number(0, len(WIDTHS) - 1)] for _ in range(LAYERS + 1)]
        state = {}
        for k in range(LAYERS):
            state[f"layers.{k}.weight"] = self.normal(widths[k + 1], widths[k]) / math.sqrt(widths[k])
            if tails:
                state[f"layers.{k}.weight"] *= (0.5 * self.normal(widths[k + 1], 1)).exp() * (
                    0.5 * self.normal(widths[k])
                ).exp()
        self.add(None, {name: W.to(self.dtype) for name, W in state.items()})

    def merged(self, parent: int, update: State, strength: float = 1.0) -> State:
        """PEFT's merge: one rounding."""
        return {
            name: (W.double() + strength * update[name]).to(self.dtype) if name in update else W
            for name, W in self.states[parent].items()
        }

    def lora(self, parent: int) -> None:
        rank, size, update = RANKS[self.number(0, len(RANKS) - 1)], self.size(0.02, 0.1), {}
        decay = torch.exp(-torch.linspace(0, 1, rank))
        for name, W in self.states[parent].items():
            M = (self.normal(W.shape[0], rank) * decay) @ self.normal(rank, W.shape[1])
            update[name] = (M * (size * W.float().norm() / M.norm())).double()
        self.add(parent, self.merged(parent, update), update)

    def full(self, parent: int) -> None:
        size = self.size(0.02, 0.1)
        update = {}
        for name, W in self.states[parent].items():
            M = self.normal(*W.shape)
            update[name] = (M * (size * W.float().norm() / M.norm())).double()
        self.add(parent, self.merged(parent, update), update)

    def strength(self, model: int) -> None:
        """A copy of a model's adapter at 0.5 to 0.8 of its strength: it lies between the model and its parent."""
        parent = self.parents[model]
        assert parent is not None
        state = self.merged(parent, self.updates[model], 0.5 + 0.3 * float(torch.rand((), generator=self.draw)))
        self.add(parent, state)
        self.parents[model] = len(self.states) - 1
        self.copied.add(model)

    def checkpoint(self, model: int) -> None:
        """The model's own LoRA after more steps: both of its factors have moved by a third."""
        parent = self.parents[model]
        assert parent is not None
        update = {}
        for name, M in self.updates[model].items():
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            rank = int(S.gt(1e-6 * S[0]).sum())
            B, A = U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * Vh[:rank]
            moved = [
                X + 0.33 * X.norm() * N / N.norm() for X, N in ((B, self.normal(*B.shape)), (A, self.normal(*A.shape)))
            ]
            update[name] = moved[0] @ moved[1]
        self.add(model, self.merged(parent, update))

    def quantised(self, parent: int) -> None:
        """int8 with a scale for each row, read back in the models' dtype."""
        self.rounded.add(parent)
        state = {}
        for name, W in self.states[parent].items():
            step = W.float().abs().amax(dim=1, keepdim=True) / 127
            state[name] = ((W.float() / step).round() * step).to(self.dtype)
        self.add(parent, state)


@dataclass(frozen=True)
class Recipe:
    """What a set is drawn from.

    Attributes:
        name: Of the row.
        steps: How each model after the base comes about: a method of `Family`, and how often.
        deep: Whether parents are drawn from all models; otherwise all are children of the base.
        hidden: Whether the base, and half of the inner models that three ways lead from, are left out.
        tails: Whether the base's weights have heavy tails.
    """

    name: str
    steps: dict[str, int]
    deep: bool
    hidden: bool = False
    tails: bool = True


RECIPES = (
    Recipe("LoRAs of one base", {"lora": 1}, deep=False),
    Recipe("LoRAs of one base, base not given", {"lora": 1}, deep=False, hidden=True),
    Recipe("LoRAs upon LoRAs", {"lora": 1}, deep=True),
    Recipe("LoRAs upon LoRAs, Gaussian weights", {"lora": 1}, deep=True, tails=False),
    Recipe("LoRAs upon LoRAs, inner ones not given", {"lora": 1}, deep=True, hidden=True),
    Recipe(
        "the same with strengths, checkpoints, int8",
        {"lora": 4, "strength": 1, "checkpoint": 1, "quantised": 1},
        deep=True,
    ),
    Recipe("full fine-tunes upon each other", {"full": 1}, deep=True),
    Recipe("LoRAs and full fine-tunes", {"lora": 2, "full": 1}, deep=True),
)


def draw(recipe: Recipe, dtype: torch.dtype, seed: int) -> tuple[Family, list[int]]:
    """A family, and the places of the models that are given."""
    family = Family(torch.Generator().manual_seed(seed), dtype)
    family.base(recipe.tails)
    kinds = [kind for kind, times in recipe.steps.items() for _ in range(times)]
    n = family.number(10, 30)
    while len(family.states) < n:
        kind = kinds[family.number(0, len(kinds) - 1)]
        loras = [i for i, update in enumerate(family.updates) if update]
        if kind in ("strength", "checkpoint"):
            # An adapter without children yet: a copy is then of what is there.
            free = [i for i in loras if i not in family.parents and i not in family.copied]
            if free:
                getattr(family, kind)(free[family.number(0, len(free) - 1)])
            continue
        # What was quantised is not trained on, nor quantised again.
        parents = [i for i in range(len(family.states)) if i == 0 or family.updates[i]]
        if kind == "quantised":
            parents = [i for i in parents if i not in family.rounded]
        if not parents:
            continue
        getattr(family, kind)(parents[family.number(0, len(parents) - 1)] if recipe.deep else 0)
    children = [family.parents.count(i) for i in range(n)]
    degrees = [count + (family.parents[i] is not None) for i, count in enumerate(children)]
    hidden = {i for i in range(n) if recipe.hidden and degrees[i] >= 3 and (i == 0 or family.number(0, 1))}
    return family, [i for i in range(n) if i not in hidden]


Splits = dict[frozenset[int], frozenset[int]]
"""For each edge the models on the side without model 0, and those below it."""


def splits(parents: dict[object, object], given: dict[object, int]) -> Splits:
    """A tree by how its edges split the models that are given.

    Args:
        parents: The parent of each node but the root.
        given: The nodes that are models, and their numbers.
    """
    below: dict[object, set[int]] = {node: set() for node in (*parents, *parents.values())}
    for node, model in given.items():
        at: object = node
        while at in parents:
            below[at].add(model)
            at = parents[at]
    everything = frozenset(given.values())
    found: Splits = {}
    for node in parents:
        side = frozenset(below[node])
        if side and side != everything:
            found[side if 0 not in side else everything - side] = side
    return found


def of_lineage(lineage: Lineage, specs: Sequence[str]) -> Splits:
    numbers = {spec: i for i, spec in enumerate(specs)}
    given = {node.name: numbers[node.spec] for node in lineage.nodes if node.spec}
    return splits({node.name: node.parent for node in lineage.nodes if node.parent}, given)


def mother(specs: Sequence[str], distance: Callable[[Tensor, Tensor], float]) -> list[Splits]:
    """MoTHer recovery, once for kurtosis that falls along edges, and once for kurtosis that grows."""
    states = [load_file(spec) for spec in specs]
    n = len(states)
    D = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            D[i, j] = D[j, i] = sum(distance(states[i][name], states[j][name]) for name in states[i])
    kurtosis = torch.tensor([sum(kurtosis_of(W) for W in state.values()) for state in states], dtype=torch.float64)
    found = []
    for sign in (1.0, -1.0):
        graph = networkx.DiGraph()
        for u in range(n):
            for v in range(n):
                if u != v:
                    wrong = bool(sign * kurtosis[u] < sign * kurtosis[v])
                    graph.add_edge(u, v, weight=float(D[u, v] + wrong * D.mean()))
        tree = networkx.minimum_spanning_arborescence(graph)
        found.append(splits({v: u for u, v in tree.edges}, {i: i for i in range(n)}))
    return found


def kurtosis_of(W: Tensor) -> float:
    centred = W.double() - W.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def l2(first: Tensor, second: Tensor) -> float:
    return float((first.float() - second.float()).norm())


def rank(first: Tensor, second: Tensor) -> float:
    """The rank of a difference above the rounding of what is stored: without that all merges are of full rank."""
    difference = first.float() - second.float()
    eps = torch.finfo(first.dtype).eps
    noise = eps * float(first.float().square().mean().sqrt()) * (sum(difference.shape) ** 0.5)
    return float(torch.linalg.svdvals(difference).gt(noise).sum())


@dataclass
class Counts:
    true: int = 0
    found: int = 0
    wrong: int = 0
    directed: int = 0
    seconds: float = 0.0

    def add(self, truth: Splits, found: Splits, seconds: float = 0.0) -> None:
        right = truth.keys() & found.keys()
        self.true += len(truth)
        self.found += len(right)
        self.wrong += len(found.keys() - truth.keys())
        self.directed += sum(truth[split] == found[split] for split in right)
        self.seconds += seconds

    def __str__(self) -> str:
        return (
            f"{self.found:4} of {self.true:4} {self.wrong:4} wrong {100 * self.directed / max(1, self.found):4.0f} % "
            f"{self.seconds:6.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2, help="of each kind and dtype")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument(
        "--recipes", type=lambda text: [int(part) for part in text.split(",")], default=range(len(RECIPES))
    )
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--without-mother", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = f"{'edges right':12} {'':10} {'directed':8} {'s':>4}"
    print(f"{'':43} {'':8} {'detune':37}   MoTHer")
    print(f"{'':43} {'':8} {columns}   {columns}")
    for recipe in (RECIPES[k] for k in options.recipes):
        for dtype in options.dtypes:
            ours, theirs = Counts(), Counts()
            for seed in range(options.first_seed, options.first_seed + options.sets):
                family, given = draw(recipe, getattr(torch, dtype), seed)
                number = {place: k for k, place in enumerate(given)}
                truth = splits({i: p for i, p in enumerate(family.parents) if p is not None}, number)
                with tempfile.TemporaryDirectory() as folder:
                    specs = [f"{folder}/{k}.safetensors" for k in range(len(given))]
                    for spec, place in zip(specs, given, strict=True):
                        save_file({name: W.contiguous() for name, W in family.states[place].items()}, spec)
                    began = time.process_time()
                    lineage = find_lineage(specs)
                    ours.add(truth, of_lineage(lineage, specs), time.process_time() - began)
                    if options.without_mother:
                        continue
                    best, taken = None, 0.0
                    for distance in (rank, l2):
                        began = time.process_time()
                        both = mother(specs, distance)
                        taken = time.process_time() - began
                        for found in both:
                            counts = Counts()
                            counts.add(truth, found, taken)
                            if best is None or (counts.found, counts.directed) > (best[0].found, best[0].directed):
                                best = counts, found
                    assert best is not None
                    theirs.add(truth, best[1], best[0].seconds)
            print(f"{recipe.name:43} {dtype:8} {ours}   {theirs}", flush=True)


if __name__ == "__main__":
    main()
