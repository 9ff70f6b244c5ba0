# The front door. `make demo` and `make test` do all the set-up themselves.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
GPU_PYTHON ?= $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types fmt cov docs bench bench-smoke fuzz lock clean bench-gpu vllm vllm-serve test-vllm

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.run: requirements/run.lock pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh run
	@touch $@

$(VENV)/.dev: requirements/dev.lock pyproject.toml scripts/setup.sh scripts/system_packages.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh dev
	sh scripts/system_packages.sh
	@touch $(VENV)/.run $@

setup: $(VENV)/.dev ## install everything that development needs (CPU PyTorch included)

demo: $(VENV)/.run ## run the shipped model on an accelerator that sees only blinded integers
	$(BIN)/cloister demo

vllm: ## install vLLM for CPU into .venv-vllm, for the gateway's tests against a real engine
	PYTHON=$(PYTHON) sh scripts/setup_vllm.sh .venv-vllm

test-vllm: $(VENV)/.dev vllm ## the gateway's tests against that vLLM
	$(BIN)/python -m pytest -m "" tests/gateway/test_vllm.py

vllm-serve: ## start that vLLM with the shipped model at http://127.0.0.1:8000
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/vllm serve src/cloister/assets/demo \
		--enable-prompt-embeds --max-model-len 512 --enforce-eager --host 127.0.0.1 --port 8000

# The test workers fill the cores; BLAS threads would spin for them.
test test-all cov: export OPENBLAS_NUM_THREADS = 1

test: $(VENV)/.dev ## the default tests: no GPU, no TEE, no network
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not tee"

test-all: $(VENV)/.dev ## every test this machine can run; says what it skipped and why
	$(BIN)/python -m pytest -n $(WORKERS) -m ""

lint: $(VENV)/.dev ## ruff, import contracts, generated documentation up to date
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/generate_docs.py --check

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

fmt: $(VENV)/.dev ## format and fix
	$(BIN)/ruff format src tests scripts examples
	$(BIN)/ruff check --fix src tests scripts examples

cov: $(VENV)/.dev ## tests with branch coverage
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not tee" --cov --cov-report=term-missing:skip-covered

docs: $(VENV)/.dev ## regenerate the generated parts and build the site, strictly
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev ## measure: speed, trusted CPU, fidelity; writes JSON records
	$(BIN)/cloister bench all

bench-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.dev) ## check and measure on a GPU in ten minutes (GPU_PYTHON: one with CUDA PyTorch)
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) scripts/bench_gpu.py

bench-smoke: $(VENV)/.dev ## a short run of every benchmark, for CI
	$(BIN)/cloister bench all --smoke --out build/bench-smoke

fuzz: $(VENV)/.dev ## fuzz every parser of foreign bytes for a minute each, an hour in all (needs the extra fuzz: atheris)
	$(BIN)/python scripts/fuzz.py --seconds 60

lock: $(VENV)/.dev ## recompute the lock files
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes -q -o requirements/run.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --excludes requirements/excludes.txt --universal --python-version 3.11 --generate-hashes -q -o requirements/dev.lock
	$(BIN)/uv pip compile requirements/vllm.in --excludes requirements/vllm_excludes.txt --universal --python-version 3.11 --generate-hashes -q -o requirements/vllm.lock

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
