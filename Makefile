# Every target makes what it needs; `make` alone prints this list.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help grid cluster plan doctor test test-long test-fast test-k8s k8s-tools manifests images bench bench-gpu check format locks env clean clean-env

STUDY ?= laptop
CONTEXT ?=
OVERLAY ?= gpu
REGISTRY ?=
TAG ?= 0.1.0
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv || echo .uv/bin/uv)
UV_VERSION := 0.13.8
LOCK := images/locks/laptop.txt
COMPILE = $(UV) pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --no-emit-index-url -q

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

grid: env ## run a study: make grid STUDY=laptop; on a cluster: make grid STUDY=paper CONTEXT=my-cluster
	@$(BIN)/datadose $(if $(CONTEXT),submit $(STUDY) --context $(CONTEXT),run $(STUDY))

cluster: env ## make what studies need on a cluster, once: make cluster OVERLAY=gpu CONTEXT=my-cluster
	@$(BIN)/datadose setup $(OVERLAY) --context $(CONTEXT)

manifests: env ## render all overlays into build/manifests
	@$(BIN)/python -m jobs.manifests build/manifests

images: ## build, push and pin the images: make images REGISTRY=ghcr.io/me TAG=0.1.0
	@images/build.sh "$(REGISTRY)" "$(TAG)"

plan: env ## what a study would run, and what it costs: make plan STUDY=laptop
	@$(BIN)/datadose plan $(STUDY)

doctor: env ## check this machine and say what to do about each finding
	@$(BIN)/datadose doctor $(STUDY) $(if $(CONTEXT),--context $(CONTEXT))

test: env ## all tests (the real small model among them: minutes)
	RAY_ADDRESS= $(BIN)/python -m pytest -m "not real and not long and not k8s" -n 2 --dist loadfile --no-loadscope-reorder --durations=20
	RAY_ADDRESS= $(BIN)/python -m pytest -m k8s --durations=20
	RAY_ADDRESS= $(BIN)/python -m pytest -m "real and not long"

test-long: env ## the longest tests: 17,600 rows behind an endpoint and five kills, gangs, cells killed
	RAY_ADDRESS= $(BIN)/python -m pytest -m long --durations=10

test-k8s: env ## the tests against a real control plane, which `make k8s-tools` builds
	RAY_ADDRESS= $(BIN)/python -m pytest -m k8s --durations=20

k8s-tools: env ## build kube-apiserver, KubeRay, Kueue and what else the tests start, once a machine
	$(BIN)/python -m tests.k8s.tools

test-fast: env ## the tests of the pure core: under a minute
	$(BIN)/python -m pytest -m fast -n 2

bench: env ## measure both sides of every claim about speed, write BENCHMARKS.md (hours; BENCH="packed prompts" for some)
	RAY_ADDRESS= $(BIN)/python -m tests.bench $(BENCH)

bench-gpu: ## tokens/s and memory of training on one GPU; needs torch, transformers, peft and bitsandbytes only
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.gpu.bench

check: env ## lint, formatting and types, of the Dockerfile too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint images/Dockerfile

format: env ## mend what the linter can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

locks: $(UV) ## resolve pyproject.toml into images/locks
	$(COMPILE) --extra laptop --extra dev -o $(LOCK)
	for world in core train serve; do $(COMPILE) --extra $$world -o images/locks/$$world.txt; done

env: .venv/.made ## make the environment in .venv (every target does)

.venv/.made: $(LOCK) pyproject.toml | $(UV)
	@echo "making .venv from $(LOCK) (about 7 GB, two or three minutes)"
	@[ -x $(BIN)/python ] || $(UV) venv -q --python $(PYTHON) .venv
	@$(UV) pip sync -q --python .venv --require-hashes --compile-bytecode $(LOCK) # or every process compiles: 13 s for each engine
	@$(UV) pip install -q --python .venv --no-deps --no-build-isolation -e .
	@touch $@

# A system Python without ensurepip cannot make a venv with pip in it, but its own pip can fill a folder.
.uv/bin/uv:
	@echo "bringing uv $(UV_VERSION) along in .uv"
	@$(PYTHON) -m pip install -q --disable-pip-version-check --target .uv uv==$(UV_VERSION) 2>/dev/null \
	  || { $(PYTHON) -m venv .uv && .uv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION); } \
	  || { echo "cannot install uv: $(PYTHON) has neither pip nor venv; install one of them, or uv itself" >&2; rm -rf .uv; exit 1; }

clean: ## remove the runs of studies in ./runs
	rm -rf runs

clean-env: ## remove the environment
	rm -rf .venv .uv
