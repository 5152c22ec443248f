"""One mutation under limits, and what became of it."""

import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from detune.errors import MAX_PART_LENGTH, DetuneError

try:
    import resource
except ImportError:  # no limits of memory where the system has none
    resource = None  # type: ignore[assignment]

__all__ = ["Finding", "Target", "Wrong", "fuzz"]

SECONDS = 10  # of the processor
WAITING_SECONDS = 600  # of a clock that others slow down: of ten programs, one may get a fiftieth of a processor
MEMORY_BYTES = 2 * 2**30


class Wrong(Exception):
    """An answer that is not the right one."""


class _Hang(BaseException):
    """Time is up; no handler for errors takes it for one."""


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
        name: Its name.
        make: Makes a sound sample in a directory.
        mutate: Changes the sample, or a copy of it.
        read: Reads what was made of it, and raises `Wrong` where the answer is not right.
    """

    name: str
    make: Callable[[Path], Any]
    mutate: Callable[[Random, Path], Any]
    read: Callable[[Path, Path], Any]


@dataclass(frozen=True)
class Finding:
    """A mutation that was neither read rightly nor refused.

    Attributes:
        target: The format.
        seed: What it was drawn from: with `number` it can be made again.
        number: Its place in the run.
        what: What became of it.
        error: The exception; None where there was none.
    """

    target: str
    seed: int
    number: int
    what: str
    error: BaseException | None = None


def fuzz(
    target: Target, numbers: range, seed: int, on_done: Callable[[str], Any] = lambda _: None
) -> tuple[Counter[str], list[Finding]]:
    """Mutate a sample and read it, once for each number.

    Args:
        target: The format.
        numbers: Which mutations of the seed.
        seed: Of all drawing.
        on_done: Called with what became of each.

    Returns:
        How often it was read and how often refused, and what was found.
    """
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="detune-fuzz-") as folder:
        sound = Path(folder) / "sound"
        sound.mkdir()
        target.make(sound)
        for number in numbers:
            work = Path(folder) / "work"
            shutil.copytree(sound, work, symlinks=True)
            # A generator of its own for each, so that one can be made again without the others.
            draw = Random(f"{seed}/{target.name}/{number}")
            target.mutate(draw, work)
            what, error = _outcome(target, sound, work)
            counts[what if what in ("read", "refused") else "found"] += 1
            if what not in ("read", "refused"):
                findings.append(Finding(target.name, seed, number, what, error))
            on_done(what)
            shutil.rmtree(work)
    return counts, findings


def _outcome(target: Target, sound: Path, work: Path) -> tuple[str, BaseException | None]:
    generator = torch.random.get_rng_state()
    try:
        with _limits():
            target.read(work, sound)
    except DetuneError as error:
        return _refused(error)
    except _Hang as error:
        return f"still at it after {SECONDS} s", error
    except MemoryError as error:
        return f"more than {MEMORY_BYTES} bytes of memory", error
    except Wrong as error:
        return f"a wrong answer: {error}", error
    except Exception as error:
        return f"{type(error).__name__} is not ours", error
    finally:
        torch.random.set_rng_state(generator)
    return "read", None


def _refused(error: DetuneError) -> tuple[str, BaseException | None]:
    """Whether a refusal is one line in three parts, and for another reason than that memory had run out."""
    text, cause = str(error), error.__cause__
    if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
        return f"more than {MEMORY_BYTES} bytes of memory", error
    if "\n" in text or text.count("; ") < 2 or not text.isprintable():
        return f"no line in three parts: {text[:200]!a}", error
    if len(text) > 3 * MAX_PART_LENGTH + 100:
        return f"a line of {len(text)} characters", error
    return "refused", error


@contextmanager
def _limits() -> Iterator[None]:
    """Time and memory for the block. The alarm rings in Python code only, which is where ours waits."""

    def ring(*_: Any) -> None:
        raise _Hang

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAITING_SECONDS)}
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    limits = resource and resource.getrlimit(resource.RLIMIT_DATA)
    if limits:
        resource.setrlimit(resource.RLIMIT_DATA, (_held_bytes() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        if limits:
            resource.setrlimit(resource.RLIMIT_DATA, limits)


def _held_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))
