"""Models whose descent is known, made step by step."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from detune.lineage.geometry import Geometry
from tests.cases import normal, seeded

SHAPES = {"layers.0.weight": (128, 96), "layers.1.weight": (96, 160), "layers.2.weight": (160, 128)}
State = dict[str, Tensor]


@dataclass
class Descent:
    """Models by name; each is made of one that is there."""

    dtype: torch.dtype = torch.float32
    seed: int = 0
    states: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = seeded(self.seed)
        # Columns of different size, as trained weights have.
        self.states["base"] = {
            name: (normal(self.draw, *shape) * (0.5 * normal(self.draw, shape[1])).exp()).to(self.dtype)
            for name, shape in SHAPES.items()
        }

    def update(self, rank: int | None, size: float = 0.05) -> State:
        """A change of every matrix, low-rank or in every direction, so large against weights of size 1."""
        changes = {}
        for name, (rows, columns) in SHAPES.items():
            low = normal(self.draw, rows, rank or 1) @ normal(self.draw, rank or 1, columns) / (rank or 1) ** 0.5
            changes[name] = size * (low if rank else normal(self.draw, rows, columns))
        return changes

    def add(self, name: str, parent: str, update: State, strength: float = 1.0) -> State:
        """A merge: one rounding. Returns the update."""
        state = self.states[parent]
        self.states[name] = {k: (W.double() + strength * update[k]).to(self.dtype) for k, W in state.items()}
        return update

    def lora(self, name: str, parent: str, rank: int = 4, size: float = 0.05) -> State:
        """A LoRA, merged onto the parent."""
        return self.add(name, parent, self.update(rank, size))

    def full(self, name: str, parent: str, size: float = 0.05) -> State:
        """A full fine-tune of the parent."""
        return self.add(name, parent, self.update(None, size))

    def int8(self, name: str, parent: str) -> None:
        """The parent rounded to int8 with a scale for each row, read back."""
        self.states[name] = {}
        for key, W in self.states[parent].items():
            step = W.float().abs().amax(dim=1, keepdim=True) / 127
            self.states[name][key] = ((W.float() / step).round() * step).to(self.dtype)

    def geometry(self, *names: str) -> Geometry:
        """The models' weights, compared."""
        blocks = [[self.states[name][key] for name in names] for key in SHAPES]
        return Geometry(blocks, [[None] * len(names)] * len(blocks))

    def saved(self, folder: Path, *names: str) -> list[str]:
        """The models on disk, a directory each."""
        for name in names:
            (folder / name).mkdir(parents=True)
            save_file(self.states[name], folder / name / "model.safetensors", metadata={"format": "pt"})
            (folder / name / "config.json").write_text("{}")
        return [str(folder / name) for name in names]
