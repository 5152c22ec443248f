"""The process that detune runs in: optional packages, silence, progress, seeds, threads, versions."""

import platform
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from detune import __version__
from detune.errors import DetuneError

__all__ = [
    "OnPart",
    "OnStart",
    "command_line",
    "global_seed",
    "needs_extra",
    "quiet",
    "telling",
    "use_threads",
    "versions",
]

OnStart = Callable[[Mapping[str, int]], None]
"""Called with the parts of a task that are to come, and how large each is: a tensor's bytes, or 1."""

OnPart = Callable[[str, object], None]
"""Called with a part's name and None when it is begun, and with what it became when it is done."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Tell what to install where a package of an extra is missing.

    Args:
        extra: Its name in pyproject.toml.

    Raises:
        DetuneError: An import in the block found nothing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DetuneError(f"{error.name} is not installed", f"pip install 'detune[{extra}]'") from error


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Silence progress bars, notes on loading and deprecations of the libraries' own making.

    Args:
        libraries: Those with transformers' manner of logging that are used beside it: "diffusers".
    """
    chatters = [import_module(f"{library}.utils.logging") for library in ("transformers", *libraries)]
    before = [(chatter.get_verbosity(), chatter.is_progress_bar_enabled()) for chatter in chatters]
    for chatter in chatters:
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
            yield
    finally:
        for chatter, (verbosity, bars) in zip(chatters, before, strict=True):
            chatter.set_verbosity(verbosity)
            if bars:
                chatter.enable_progress_bar()


@contextmanager
def telling(on_part: OnPart | None, name: str) -> Iterator[None]:
    """Tell of a part of a task when it is begun, and when it is done; None tells nobody."""
    if on_part:
        on_part(name, None)
    yield
    if on_part:
        on_part(name, True)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which PEFT and dropout draw from, and put it back.

    Trainers seed those of Python and numpy as well: these are put back too.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute on this many CPU threads, and put the number back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command_line() -> tuple[str, ...]:
    """The command line, the program by its name alone."""
    program, *words = sys.argv
    return (Path(program).name, *words)


def versions() -> dict[str, str]:
    """Versions of detune and of what its figures depend on."""
    import torch

    return {"detune": __version__, "python": platform.python_version(), "torch": torch.__version__}
