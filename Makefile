# `make demo` and `make test` are all the set-up there is: each builds .venv first, where it is missing or out of date.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3)
ARGS ?=
BIN := .venv/bin
EXTRAS := serve,report,onnx,index,keras,bench,test
# The tests run side by side, so each process keeps to one thread.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help env demo test lint format type docs bench fuzz test-browser test-slow gpu-check browser-example image-check cluster-demo cluster-serve-demo test-cluster clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/stamp ## build .venv with everything the targets need

.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'Pennyweight needs Python 3.11 or newer, and "$(PYTHON)" is not. Install one, or name it: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '"$(PYTHON)" cannot make environments. On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	@echo 'building .venv: PyTorch and the rest, a few minutes, once'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: .venv/stamp ## train, optimize, prove, report and answer a request, on the shipped sample
	$(BIN)/pennyweight demo --out runs/demo $(ARGS)

test: lint type ## every gate: format, lint, types, tests (ARGS go to pytest)
	$(ONE) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not browser and not slow' $(ARGS)

lint: .venv/stamp ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/stamp ## let ruff write what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: .venv/stamp ## mypy, strict
	$(BIN)/mypy

docs: .venv/stamp ## run every block and check every command of README and docs
	$(ONE) $(BIN)/python -m pytest tests/test_docs.py $(ARGS)

bench: ## list the benchmarks
	@for file in $$(grep -l __main__ benchmarks/*.py); do \
	  printf '  make bench-%-12s %s\n' "$$(basename "$$file" .py)" "$$(head -1 "$$file" | tr -d '"')"; done

bench-%: .venv/stamp ## run one (ARGS=--quick checks the harness only)
	$(BIN)/python -m benchmarks.$* $(ARGS)

fuzz: .venv/stamp ## ask the service whatever its OpenAPI description allows (Schemathesis, in an environment of its own)
	@test -x .venv/fuzz/bin/schemathesis || { $(PYTHON) -m venv .venv/fuzz && \
	  .venv/fuzz/bin/python -m pip install --quiet --disable-pip-version-check schemathesis==4.32.5; }
	$(BIN)/python -m tests.serve.fuzz .venv/fuzz/bin/schemathesis $(ARGS)

.venv/browser: .venv/stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

test-browser: .venv/browser ## page and report in a real browser (Debian's chromium)
	@command -v chromium >/dev/null || { echo 'no chromium here; on Debian: apt-get install chromium'; exit 1; }
	$(BIN)/python -m pytest -m browser $(ARGS)

test-slow: .venv/stamp ## what takes minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

runs/demo/best: | .venv/stamp
	$(BIN)/pennyweight demo --out runs/demo

browser-example: .venv/stamp | runs/demo/best ## build examples/browser/site: digits and films in a browser (npm)
	$(BIN)/python examples/browser/build.py $(ARGS)

image-check: .venv/stamp ## run the Dockerfile in a fresh Debian root and ask its service (root, debootstrap, buildah)
	$(BIN)/python deploy/imagecheck.py $(ARGS)

cluster-demo: .venv/stamp ## two hosts in network namespaces train one model, a worker is killed, and it does not show (root, iproute2)
	$(BIN)/python deploy/clusterdemo.py $(ARGS)

.venv/ray: .venv/stamp
	$(BIN)/python -m venv .venv/ray
	.venv/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray-serve]'

cluster-serve-demo: .venv/ray | runs/demo/best ## two replicas under Ray Serve, our rule between them, one is killed
	.venv/ray/bin/python deploy/servedemo.py runs/demo/best $(ARGS)

test-cluster: .venv/ray ## what test leaves out without Ray Serve (others' warnings are no errors there)
	.venv/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt httpx hypothesis pytest pytest-timeout
	.venv/ray/bin/python -m pytest -W default tests/serve/test_replicas.py $(ARGS)

gpu-check: .venv/stamp ## build, check and time all that needs a GPU; without one, say what is skipped
	$(BIN)/python -m benchmarks.gpu $(ARGS)
	$(BIN)/python -m pytest tests/accelerate -m gpu -q

clean: ## remove the environment, the caches and the demo
	rm -rf .venv runs/demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
