# The project's commands. `make` installs the project, `make help` lists the other targets.
PYTHON ?= python3
VENV ?= .venv
OUTPUT_DIR ?= $(or $(JOB_OUTPUT_DIR),output/train)
DEMO_DIR ?= output/demo
DATA_DIR ?= $(or $(JOB_DATA_DIR),data)
BENCH_DIR ?= build/bench
BENCH_ROUNDS ?= 3
# Another checkout of this project that bench-start compares with.
BASELINE ?=
# The interpreter with PyTorch and JAX, for bench-peers.
PEERS_PYTHON ?= $(BIN)/python
CHAOS_DIR ?= build/chaos
CHAOS_ROUNDS ?= 100
PYTEST_ARGS ?=
# Options for the program, as in make train ARGS="--epochs 3".
ARGS ?=
DOCKER ?= docker
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
IMAGE ?= cifar10-job:$(VERSION)
BASE_IMAGE ?= tensorflow/tensorflow:2.21.0-gpu
KUBECTL ?= kubectl
# The folder that k8s-run applies, such as k8s/overlays/multi-node.
K8S ?= k8s
# Not OUTPUT_DIR, which can contain a local run.
FETCH_DIR ?= output/k8s

# Device nodes reveal an NVIDIA GPU even if the driver's tools are not installed.
LOCK := $(if $(wildcard /dev/nvidia[0-9]*),gpu,cpu)
BIN := $(VENV)/bin

# Without this check, make would ignore EPOCHS=3 and train for 50 epochs. JOB_EPOCHS=3 works, because make exports it.
# The tables in docs/options.md and docs/predict.md name the options; two of them are also variables of this file.
OPTIONS := $(filter-out DATA_DIR OUTPUT_DIR,$(shell \
  sed -n 's/^| `--[a-z0-9-]*` | `JOB_\([A-Z0-9_]*\)` .*/\1 \L\1/p' docs/options.md docs/predict.md))
$(foreach name,$(OPTIONS),$(if $(filter command,$(origin $(name))),\
  $(error received $(name), which is not a variable of this Makefile; pass options of the program in \
  ARGS, as in make train ARGS="--epochs 3")))

ACCEPT_ARGS := demo train doctor docker-run bench-start bench-peers
$(if $(filter command,$(origin ARGS)),$(if $(filter $(ACCEPT_ARGS),$(MAKECMDGOALS)),,\
  $(error received ARGS, which only these targets accept: $(ACCEPT_ARGS); remove it)))

# make reports every exit code except 0 as an error, but 75 is not one. set -x prints the command without this suffix.
EXPLAIN = || { code=$$?; test $$code -ne 75 || \
  echo "make: exit code 75 is not a failure: run the same command again to resume (see the line above)" >&2; exit $$code; }

.DEFAULT_GOAL := install
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(VENV)/.$(LOCK) ## Install into .venv, with the GPU libraries on a machine with an NVIDIA GPU

.PHONY: demo
demo: install ## Train for a few epochs on the embedded synthetic data set; needs no data and no GPU
	@(set -x; $(BIN)/cifar10-job train --dataset synthetic --limit 9600 --batch-size 32 --epochs 3 \
	  --learning-rate 1e-3 --output-dir $(DEMO_DIR) $(ARGS)) $(EXPLAIN)
	@$(BIN)/python -c 'from job.data.synthetic import save_examples as save; save("$(DEMO_DIR)/test-images")'
	@echo "Open $(DEMO_DIR)/report.html"

.PHONY: train
train: install ## Run the real job: CIFAR-10, recipe classic, 50 epochs; ARGS="--epochs 3" adds options
	@(set -x; $(BIN)/cifar10-job train --data-dir $(DATA_DIR) --output-dir $(OUTPUT_DIR) $(ARGS)) $(EXPLAIN)

.PHONY: doctor
doctor: install ## Check this machine's GPUs, libraries and folders
	$(BIN)/cifar10-job doctor --data-dir $(DATA_DIR) --output-dir $(OUTPUT_DIR) $(ARGS)

BUILD_IMAGE = --file docker/Dockerfile --tag $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

# The commit of this checkout, with -dirty if the checkout differs from it, whatever git variables are set.
REVISION = $(shell unset $$(git rev-parse --local-env-vars); git --git-dir=.git --work-tree=. describe --always --dirty --abbrev=40 --exclude '*')

# Checks that a program is installed. The argument is its command, which can include options.
NEEDS = @command -v $(firstword $(1)) > /dev/null || \
  { echo "make $@ needs $(firstword $(1)), which is not installed; install it, or set another command:" \
    "make $@ $(2)" >&2; exit 2; }
NEEDS_DOCKER = $(call NEEDS,$(DOCKER),DOCKER=podman)
NEEDS_KUBECTL = $(call NEEDS,$(KUBECTL),KUBECTL=/path/to/kubectl)

.PHONY: image
image: ## Build the image IMAGE on BASE_IMAGE
	$(NEEDS_DOCKER)
	$(DOCKER) build $(BUILD_IMAGE)

.PHONY: image-test
image-test: image ## Train briefly in the image: as any user, read-only, without network or GPU
	$(DOCKER) run --rm --read-only --cap-drop all --network none --user 42424:0 \
	  --tmpfs /output --env JOB_REQUIRE_GPUS=0 $(IMAGE) \
	  train --dataset synthetic --limit 2560 --epochs 1

.PHONY: docker-run
docker-run: ## Train in the image on every GPU, output in ./output; ARGS="--epochs 3" adds options
	$(NEEDS_DOCKER)
	mkdir -p output data
	$(DOCKER) run --rm --gpus all --user "$$(id -u):$$(id -g)" \
	  --volume "$$PWD/output:/output" --volume "$$PWD/data:/data" $(IMAGE)$(if $(ARGS), train $(ARGS)) $(EXPLAIN)

.PHONY: push
push: ## Build and push IMAGE=registry/name:tag with its SBOM and provenance
	@case "$(IMAGE)" in */*:*) ;; *) echo "IMAGE is $(IMAGE), expected registry/name:tag;" \
	  "run make push IMAGE=registry.example.com/team/cifar10-job:$(VERSION)" >&2; exit 2;; esac
	$(NEEDS_DOCKER)
	@$(DOCKER) buildx version > /dev/null || \
	  { echo "$(DOCKER) has no buildx; install docker-buildx" >&2; exit 2; }
	$(DOCKER) buildx build --push --sbom=true --provenance=mode=max $(BUILD_IMAGE)

.PHONY: audit
audit: $(VENV)/.dev ## Check the locked packages for known vulnerabilities
	$(BIN)/pip-audit --strict --disable-pip --require-hashes $(foreach lock,$(wildcard locks/*.txt),-r $(lock))

PYTEST := $(BIN)/python -m pytest --dist loadfile --numprocesses

.PHONY: test
test: $(VENV)/.dev ## Run the fast tests: no cluster, container, browser or documentation commands
	$(PYTEST) 2 -m "not slow" $(PYTEST_ARGS)

# The slow tests spend half of their time waiting, so three processes keep two cores busy.
.PHONY: test-all
test-all: test ## Run every test that this machine supports
	$(PYTEST) 3 -m slow $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.dev ## Check formatting, lint, types and the layers of the packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile tests/integration/base.Dockerfile
	$(BIN)/shellcheck .ci/run k8s/*.sh slurm/*.sh tests/integration/*.sh

BENCH_OPTIONS = --data-dir $(DATA_DIR) --output-dir $(BENCH_DIR) --rounds $(BENCH_ROUNDS)

.PHONY: bench
bench: $(VENV)/.dev ## Compare this job with the conventional Keras script, profile it, and measure predict
	$(BIN)/python -m tests.benchmarks.bench $(BENCH_OPTIONS)
	$(BIN)/python -m tests.benchmarks.bench_predict $(BENCH_OPTIONS)

.PHONY: bench-workers
bench-workers: $(VENV)/.dev ## Measure a step with one to four workers on this machine, and their network traffic
	$(BIN)/python -m tests.benchmarks.bench_workers $(BENCH_OPTIONS)

.PHONY: bench-start
bench-start: $(VENV)/.dev ## Time a short run from start to exit; BASELINE=checkout compares with another checkout
	$(BIN)/python -m tests.benchmarks.bench_start $(BENCH_OPTIONS) \
	  $(if $(BASELINE),--baseline $(BASELINE)) $(ARGS)

.PHONY: bench-peers
bench-peers: $(VENV)/.dev ## Compare this job with PyTorch and JAX; PEERS_PYTHON is a Python that has both
	$(BIN)/python -m tests.benchmarks.bench_peers $(BENCH_OPTIONS) --python $(PEERS_PYTHON) $(ARGS)

.PHONY: chaos
chaos: $(VENV)/.dev ## Kill and resume small trainings in CHAOS_ROUNDS rounds, and compare every bit
	$(BIN)/python -m tests.integration.chaos --data-dir $(DATA_DIR) --rounds $(CHAOS_ROUNDS) \
	  --output-dir $(CHAOS_DIR)

.PHONY: lock
lock: $(VENV)/.dev ## Resolve the dependencies again and pin them with hashes
	$(BIN)/uv pip compile $(UV_COMPILE) pyproject.toml -o locks/cpu.txt
	$(BIN)/uv pip compile $(UV_COMPILE) pyproject.toml --extra gpu -c locks/cpu.txt -o locks/gpu.txt
	$(BIN)/uv pip compile $(UV_COMPILE) pyproject.toml --extra gpu -c locks/gpu.txt \
	  $(foreach package,$(FROM_BASE),--no-emit-package $(package)) -o locks/image.txt
	$(BIN)/uv pip compile $(UV_COMPILE) pyproject.toml --group dev -c locks/cpu.txt -o locks/dev.txt

# Packages that the base image provides or that only the build of TensorFlow needs.
FROM_BASE := tensorflow libclang wheel setuptools

UV_COMPILE := --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
  --custom-compile-command 'make lock' --no-annotate

# The template of a Job cannot be changed, so the old Job is deleted first. The deletion waits for its Pods, which
# write a checkpoint: otherwise two Jobs would write to one folder. If kubectl rejects the new Job, nothing is deleted.
.PHONY: k8s-run
k8s-run: ## Start the Job in K8S on Kubernetes, replacing an existing one
	$(NEEDS_KUBECTL)
	names=$$($(KUBECTL) create -k $(K8S) --dry-run=client --validate=strict --output=name) && \
	$(KUBECTL) delete --ignore-not-found --cascade=foreground $$(echo "$$names" | grep ^job) && \
	$(KUBECTL) apply -k $(K8S)

.PHONY: k8s-fetch
k8s-fetch: ## Copy the artifacts of the Job in K8S from its volume to FETCH_DIR
	$(NEEDS_KUBECTL)
	@KUBECTL="$(KUBECTL)" k8s/fetch.sh $(K8S) $(FETCH_DIR)

.PHONY: clean
clean: ## Remove all build products, but not the output or the data
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), expected Python 3.11 to 3.13;" \
	    "run make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) has no venv module; on Debian and Ubuntu:" \
	    "apt-get install python3-venv" >&2; exit 2; }

# The locks pin every package with its hashes; the project itself adds no other packages.
$(VENV)/.cpu $(VENV)/.gpu: $(VENV)/.%: locks/%.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes -r locks/$*.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.dev: locks/dev.txt $(VENV)/.$(LOCK)
	$(BIN)/python -m pip install --quiet --require-hashes -r locks/dev.txt
	@touch $@
