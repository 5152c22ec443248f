"""Executors, one file each: what hands work to workers. `EXECUTORS` in `detune.cli.execution` gives each an option."""
