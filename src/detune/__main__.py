"""`python -m detune` is the command `detune`."""

from detune.cli import main

if __name__ == "__main__":
    main()
