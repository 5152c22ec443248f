"""Commands that are killed, told to end or out of disk at each operation on files: `make crash`.

| module | what it knows |
| --- | --- |
| `operations` | how an operation of a process is counted, and struck |
| `commands` | the commands, what each makes, and the models they are run on |
| `runner` | one run in a process of its own, the run after it, and what must hold |
"""
