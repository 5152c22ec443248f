"""What every training run here needs: silence, a seed that leaves no trace, a fixed number of threads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from detune.errors import DetuneError

__all__ = ["needs_extra", "quiet", "seeded", "use_threads"]


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
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, notes on loading and deprecations of its own making."""
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which PEFT and dropout draw from, and put it back."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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
