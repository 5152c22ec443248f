"""Does the recovered model do what the base does? Asked last, in a process of its own.

A model's configuration is anybody's: a class that allocates without end, or an activation that nobody knows, must not
cost the audit what it has found. So the models are run by another process, `detune.audit.model_process`, with a limit
of memory and one of time, and whatever becomes of it is one sentence of the report.
"""

import json
import subprocess
import sys
from pathlib import Path

from detune.audit.model_process import Request
from detune.audit.record import Behaviour
from detune.bench.behaviour import DrawnImages, behaviour_of
from detune.checkpoints import Checkpoint
from detune.errors import InputError, parsing, reason_of

__all__ = ["Judge"]

PROMPTS = Path(__file__).parent / "assets" / "prompts.csv"

# bf16 weights computed with in float64, of two models for a moment, and all that the libraries and the inputs take.
MEMORY_COPIES, MEMORY_BYTES = 16, 4 * 2**30
# A language model of 7B writes its texts in an hour on a slow processor.
SECONDS, SECONDS_PER_GB = 600.0, 600.0


class Judge:
    """Runs a release, the recovered model and the base, if there is one, on the same inputs.

    Args:
        release: The first one.
        base: The owner's; None where it was not given.
        inputs: What to run them on; None takes some sentences, which models of text can do with.

    Raises:
        InputError: Inputs were given, and the models are of no kind that takes them.
    """

    def __init__(self, release: Checkpoint, base: Checkpoint | None, inputs: Path | None) -> None:
        self._release = release
        self._base = base
        self._inputs = inputs or PROMPTS
        self.note = ""
        reference = base or release
        for model in (release, reference):
            if not Path(model.spec).expanduser().is_dir():
                self.note = f"not run: {model.spec} is no directory of a model"
                return
        try:
            with parsing(f"the configuration of {reference.root}"):
                kind = behaviour_of(reference.root, self._inputs)
        except InputError as why:
            if inputs is not None:
                raise
            self.note = f"not run: {why}"
            return
        if isinstance(kind, DrawnImages) and inputs is None:
            self.note = "not run: a pipeline draws for minutes; give prompts with --inputs"

    @property
    def is_ready(self) -> bool:
        """Whether the models can be run."""
        return not self.note

    def judge(self, recovered: Path) -> Behaviour:
        """Compare.

        Args:
            recovered: The recovered model, a directory; the answer of the process goes beside it.

        Returns:
            The distances; a note where a package is missing, or a model cannot be run within the limits.
        """
        weights = self._release.total_bytes
        answer = recovered.with_name("behaviour.json")
        seconds = SECONDS + SECONDS_PER_GB * weights / 1e9
        request = Request(
            release=str(self._release.root),
            recovered=str(recovered),
            base=None if self._base is None else str(self._base.root),
            inputs=str(self._inputs),
            answer=str(answer),
            memory_bytes=MEMORY_COPIES * weights + MEMORY_BYTES,
        )
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "detune.audit.model_process"],
                input=json.dumps(request.__dict__).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Behaviour(note=f"not run: the models were still running after {seconds:.0f} s")
        except OSError as error:
            return Behaviour(note=f"not run: no process could be started; {reason_of(error)}")
        if ended.returncode < 0:
            return Behaviour(note=f"not run: the process that ran the models was killed (signal {-ended.returncode})")
        try:
            found = Behaviour.model_validate_json(answer.read_bytes())
        except (OSError, ValueError):
            said = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return Behaviour(note=f"not run: the process that ran the models failed; {said or ended.returncode}")
        return found
