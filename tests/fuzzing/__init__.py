"""Fuzzers of everything that is read: `make fuzz`, or `python -m tests.fuzzing --help`.

| module | what it knows |
| --- | --- |
| `mutation` | how bytes and JSON are changed |
| `targets` | the formats: a sound sample of each, what is changed in it, how it is read, and what the right answer is |
| `pages` | the same for what becomes Markdown and tables: cards, results, entries of the leaderboard |
| `runner` | one mutation under limits of time and memory, and what became of it |
"""
