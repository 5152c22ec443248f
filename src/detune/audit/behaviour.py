"""Does the recovered model do what the base does?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detune.audit.record import Behaviour
from detune.bench.behaviour import DrawnImages, behaviour_of
from detune.bench.behaviour.base import Behaviour as Kind
from detune.checkpoints import Checkpoint
from detune.errors import DetuneError, InputError

__all__ = ["Judge"]

PROMPTS = Path(__file__).parent / "assets" / "prompts.csv"

# The metric that stands for each, in words.
MEANINGS = {
    "activation": "mean cosine distance of the hidden states, over inputs and blocks",
    "sbert": "mean distance of the sentence embeddings of the texts written",
    "lpips": "mean perceptual distance of the images drawn",
    "levels": "largest difference of the images drawn, in levels of 255",
}


class Judge:
    """Runs a release, the recovered model and the base, if there is one, on the same inputs.

    Args:
        release: The first one.
        base: The owner's; None where it was not given.
        inputs: What to run them on; None takes some sentences, which models of text can do with.
    """

    def __init__(self, release: Checkpoint, base: Checkpoint | None, inputs: Path | None) -> None:
        self._release = release
        self._base = base
        self.note = ""
        self._kind: Kind[Any] | None = None
        reference = base or release
        for model in (release, reference):
            if not Path(model.spec).expanduser().is_dir():
                self.note = f"not run: {model.spec} is no directory of a model"
                return
        try:
            self._kind = behaviour_of(reference.root, inputs or PROMPTS)
        except InputError as why:
            if inputs is not None:
                raise
            self.note = f"not run: {why}"
        if isinstance(self._kind, DrawnImages) and inputs is None:
            self._kind, self.note = None, "not run: a pipeline draws for minutes; give prompts with --inputs"

    @property
    def is_ready(self) -> bool:
        """Whether the models can be run."""
        return self._kind is not None

    def judge(self, recovered: Path) -> Behaviour:
        """Compare.

        Args:
            recovered: The recovered model, a directory.

        Returns:
            The distances; a note where a package is missing, or a model cannot be run.
        """
        assert self._kind is not None
        kind = self._kind
        try:
            seen = kind.observe(recovered)
            release = kind.observe(self._release.root)
            if self._base is None:
                return self._distances({"release": kind.compare(seen, release).values})
            truth = kind.observe(self._base.root)
            values = {"release": kind.compare(truth, release).values, "recovered": kind.compare(truth, seen).values}
            return self._distances(values)
        except DetuneError as why:
            return Behaviour(note=f"not run: {why}")

    def _distances(self, values: Mapping[str, Mapping[str, float]]) -> Behaviour:
        metric = next(name for name in MEANINGS if name in values["release"])
        inputs = getattr(self._kind, "prompts", ()) or getattr(self._kind, "images", ())
        return Behaviour(
            metric=metric,
            meaning=MEANINGS[metric],
            inputs=len(inputs),
            release=values["release"][metric],
            recovered=values["recovered"][metric] if "recovered" in values else None,
        )
