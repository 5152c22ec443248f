"""The command `detune`, as a script and as `python -m detune`."""

import os
import sys


def main() -> None:
    """Import the command and run it; Ctrl-C meanwhile is one line too."""
    try:
        from detune.cli import main as command
    except KeyboardInterrupt:
        print("detune: interrupted before it began", file=sys.stderr, flush=True)
        os._exit(130)
    command()


if __name__ == "__main__":
    main()
