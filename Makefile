# Every target does its own set-up and is safe to run again. Python 3.11 or newer, make, gcc and g++ are all it needs.
PYTHON ?= python3.11
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
RUN ?= quickstart
CYCLES ?= 100
SEED ?= 1

# Compiled bytecode halves the start of every process; some images switch it off.
export PYTHONDONTWRITEBYTECODE =
# The quickstart and the tests read local data and small local models only.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export RAY_USAGE_STATS_ENABLED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: help install quickstart test lint format types check bench bench-kernels bench-data bench-rpo bench-dashboard bench-scale bench-all security fuzz docs drills soak clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## virtual environment with pinned versions

# torch goes first and by pip, which also finds wheels on disk; uv installs the rest in seconds.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (about 1 minute) =="
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install  ## train a small model on real text, fed by the mixing service (about 5 minutes)
	$(BIN)/python launch/quickstart.py --run $(RUN)

test: install  ## the whole CPU suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install  ## rewrite files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mypy sees the import names mixwright.<folder> through links, which git ignores.
.typecheck/mixwright: Makefile
	@mkdir -p $@
	@for room in kernels data_mixing pretrain launch; do ln -sfn ../../$$room $@/$$room; done
	@touch $@

types: install .typecheck/mixwright  ## static types
	$(BIN)/mypy

check: lint types security test  ## all of the above

bench: install  ## training throughput beside transformers.Trainer; what instance weights cost
	$(BIN)/python -m tests.benchmarks.bench_training
	$(BIN)/python -m tests.benchmarks.bench_weighting

bench-data: install  ## rows into a rank beside other loaders; gather, plan, journal, controller
	$(BIN)/python -m tests.benchmarks.bench_gather
	$(BIN)/python -m tests.benchmarks.bench_plan
	$(BIN)/python -m tests.benchmarks.bench_controller
	$(BIN)/python -m tests.benchmarks.bench_loaders

bench-kernels: install  ## loss kernels beside plain torch
	$(BIN)/python -m mixwright.kernels.bench
	$(BIN)/python -m mixwright.kernels.bench_distillation
	$(BIN)/python -m tests.benchmarks.bench_head

bench-rpo: install  ## a step of preference optimisation beside TRL's DPOTrainer
	$(BIN)/python -m tests.benchmarks.bench_rpo

bench-dashboard: install  ## first paint and panels on a run of 100,000 steps
	$(BIN)/python -m tests.benchmarks.bench_dashboard

bench-scale: install  ## 1,000 ranks and 10,000 domains, simulated: messages, bytes, plan, controller
	$(BIN)/python -m tests.benchmarks.bench_scale

# Peers that are no dependency of ours; those that cannot be installed are named by the benchmark and left out.
$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	for peer in grain torchdata "mosaicml-streaming torchvision"; do $(PEERS)/bin/python -m pip install --quiet $$peer || true; done
	@touch $@

bench-all: install $(PEERS)/.installed  ## every benchmark beside its peers, into docs/benchmarks.md (about 30 minutes)
	MIXWRIGHT_PEERS_PYTHON=$(PEERS)/bin/python $(BIN)/python -m tests.benchmarks.run

docs: install .typecheck/mixwright  ## the documentation as a site, in site/; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

security: install  ## bandit over the code, pip-audit over the pinned versions
	$(BIN)/python -m tests.security.audit

fuzz: install  ## property and fuzz tests with new examples, 20 times as many
	MIXWRIGHT_FUZZ=20 $(BIN)/python -m pytest tests/properties -q --timeout 7200

drills: install  ## kill, freeze and starve a real run (CYCLES=100 SEED=1)
	$(BIN)/python -m tests.drills.run --seed $(SEED) --cycles $(CYCLES)

soak: install  ## two hours of simulated steps: is memory flat, are files bounded
	$(BIN)/python -m tests.benchmarks.soak

clean:  ## remove the virtual environment and caches; runs are kept
	rm -rf $(VENV) $(PEERS) site .typecheck .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
