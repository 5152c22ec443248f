"""The program that runs models for an audit: `python -m detune.audit.model_process`, a request on its standard input.

The audit starts it; see `detune.audit.behaviour`. It ends with an answer in a file, or not at all.
"""

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detune.audit.record import Behaviour
from detune.errors import DetuneError, reason_of

if TYPE_CHECKING:
    from detune.bench.behaviour import Metric

__all__ = ["Request", "main"]


@dataclass(frozen=True)
class Request:
    """The two models to compare.

    Attributes:
        release: The directory of the first release.
        recovered: That of the recovered model.
        base: That of the base; None where it was not given.
        inputs: What they are run on.
        answer: The file to make.
        memory_bytes: How much more this process may take, once the libraries are loaded; less where the machine has
            less.
    """

    release: str
    recovered: str
    base: str | None
    inputs: str
    answer: str
    memory_bytes: int


def main() -> None:
    """Answer the request."""
    request = Request(**json.load(sys.stdin))
    try:
        found = _compare(request)
    except DetuneError as why:
        found = Behaviour(note=f"not run: {why}")
    except Exception as error:
        # Whatever a model's own files make a library raise.
        found = Behaviour(note=f"not run: {type(error).__name__}: {reason_of(error)}")
    Path(request.answer).write_text(found.model_dump_json(), encoding="utf-8")


def _compare(request: Request) -> Behaviour:
    from detune.bench.behaviour import behaviour_of

    _limit_memory(request.memory_bytes)
    kind = behaviour_of(Path(request.base or request.release), Path(request.inputs))
    seen = kind.observe(Path(request.recovered))
    release = kind.observe(Path(request.release))
    if request.base is None:
        values = {"release": kind.compare(seen, release).values}
    else:
        truth = kind.observe(Path(request.base))
        values = {"release": kind.compare(truth, release).values, "recovered": kind.compare(truth, seen).values}
    inputs = getattr(kind, "prompts", ()) or getattr(kind, "images", ())
    return _distances(values, len(inputs))


def _distances(values: "Mapping[str, Mapping[Metric, float]]", inputs: int) -> Behaviour:
    from detune.bench.behaviour import MEANINGS

    metric = next(name for name in MEANINGS if name in values["release"])
    release = values["release"][metric]
    recovered = values["recovered"][metric] if "recovered" in values else None
    if not math.isfinite(release) or not math.isfinite(recovered or 0.0):
        return Behaviour(
            note=f"not compared: {metric} is {release} for the release, {recovered} for the recovered model"
        )
    return Behaviour(metric=metric, meaning=MEANINGS[metric], inputs=inputs, release=release, recovered=recovered)


def _limit_memory(more_bytes: int) -> None:
    """Refuse this process more memory of its own than some bytes, where the system can."""
    import torch  # noqa: F401  # takes its own first
    import transformers  # noqa: F401

    # Linux counts what is written there and nowhere else; elsewhere the limit is for a part, or for none.
    with suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = _told("/proc/self/status", "VmData") + min(more_bytes, _told("/proc/meminfo", "MemAvailable"))
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )


def _told(file: str, field: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
