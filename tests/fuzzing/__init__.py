"""Fuzzers of everything that is read: `make fuzz`, or `python -m tests.fuzzing --help`.

| module | what it knows |
| --- | --- |
| `mutation` | how bytes and JSON are changed |
| `weights`, `adapters`, `models`, `pages` | formats: a sound sample, what is changed, how it is read, the answer |
| `targets` | all of them, by name |
| `runner` | one mutation under limits of time and memory, and what became of it |
"""
