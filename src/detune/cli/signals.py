"""Signals that end the command: the first becomes an exception, which cleans up on its way out."""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

__all__ = ["Interrupted", "keeping", "keeping_finished", "leave", "signals_raised"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what `kill` and batch systems send, and a terminal that is closed."""


class Interrupted(BaseException):
    """A signal that ends the command. Not a `KeyboardInterrupt`, which libraries have uses of their own for.

    Args:
        number: The signal's.

    Attributes:
        exit_code: What a shell shows for a process that the signal has ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Interrupted` at the first signal in the block; further ones do not disturb the cleaning up.

    Signals that the process was started to ignore, as by `nohup`, stay ignored.

    Raises:
        Interrupted: In the end too, where something on the way, as an import, made another exception of it.
    """
    raised: list[Interrupted] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Where the last one was lost, as in a destructor, whose exceptions Python drops, the next one is heard.
        if not raised or sys.exception() is None:
            raised.append(Interrupted(number))
            raise raised[-1]

    before = {number: signal.getsignal(number) for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    except BaseException as error:
        if not raised:
            raise
        _ignore()
        if error is not raised[-1]:
            for note in getattr(error, "__notes__", ()):
                raised[-1].add_note(note)
        raise raised[-1] from None
    finally:
        if sys.exception() not in raised:
            for number, handler in before.items():
                signal.signal(number, handler)
            # Only the interpreter's own end is left, which no signal could shorten.
            atexit.unregister(_ignore)
            atexit.register(_ignore)


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Say what is kept, where a signal ends the block."""
    try:
        yield
    except Interrupted as error:
        error.add_note(what)
        raise


def keeping_finished(out: Path) -> AbstractContextManager[None]:
    """Say where the finished parts stay, of a block that goes on from them."""
    return keeping(f"what is finished stays in {out}: the same command does the rest")


def leave(exit_code: int) -> NoReturn:
    """End the process now, with threads that still compute: what they are at is not wanted any more."""
    # Some must run: without multiprocessing's, its semaphores outlive the process.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
