# Every target but help needs only `setup`, and runs it when it is missing. `make PYTHON=/path/to/python3.12 setup` picks the Python.
PYTHON  ?=
WORKERS ?= 2
ARGS    ?=
CHAOS   := $(addprefix tests/test_,bad_days.py hostile.py hostile_rows.py hostile_sources.py mutations.py neighbours.py serve_hostile.py chat_run.py mutants_generated.py option_faults.py)
READY   := .venv/.ready
PY      := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup speedrun chat test lint aot bench plots fuzz chaos

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install what constraints.txt pins
	@echo "setup: .venv is up to date"

$(READY): pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" .ci/setup
	@touch $@

speedrun: $(READY)  ## the main job: train, sample, plot, report; picks a preset for this CPU or GPU
	$(PY) -m train.speedrun $(ARGS)

chat: $(READY)  ## an assistant from nothing, without a network: tokenizer, base, SFT, RL, evaluation, report card
	$(PY) -m train.chat $(ARGS)

test: $(READY)  ## run the tests; each worker keeps to one thread, so that WORKERS=2 fills two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

aot: $(READY)  ## compile every kernel for seven architectures without a GPU, and hold it to the gates
	$(PY) -m kernels.proof.aot $(ARGS)
	$(PY) -m kernels.proof.aot --parity

bench: $(READY)  ## measure: on a GPU the whole campaign, elsewhere what a CPU can show
	$(PY) -m bench $(ARGS)

plots: $(READY)  ## redraw the figures from the rows in results/
	$(PY) -m bench.plots $(ARGS)

fuzz: $(READY)  ## the random cases of the parity tests, 10,000 of them for every op, new ones at every run
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) tests/test_parity.py -k fuzz --fuzz-examples=10000 $(ARGS)

chaos: $(READY)  ## kills, signals, damage, hostile files, flags, clients and neighbours, faulty kernels: as often as it takes to trust
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rP --chaos $(CHAOS) $(ARGS)
