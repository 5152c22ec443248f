"""Starting up: what takes seconds is imported late, and without the garbage collector."""

import gc
import sys

__all__ = ["load_torch"]


def load_torch() -> None:
    """Import torch, if it is not there yet, in a process that is the command's own.

    It is some hundred thousand objects that live as long as the process. The collector would look through them again
    and again while they are made, and once more at the end: a third of the time that `detune inspect` takes on a small
    model.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
    from detune.recovery.execution.memory import keep_freed_memory

    keep_freed_memory()
