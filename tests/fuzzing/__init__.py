"""Fuzzers of everything that is read: `make fuzz`, or `python -m tests.fuzzing --help`.

| module | what it knows |
| --- | --- |
| `mutation` | how bytes and JSON are changed |
| `samples` | sound files to start from, and how each format is taken apart |
| `targets` | the formats: what is changed in them, how they are read, and what the right answer is |
| `runner` | one mutation under limits of time and memory, and what became of it |
"""
