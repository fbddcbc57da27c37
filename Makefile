# Everything a contributor runs. `make demo` and `make test` set up what they need on a clean clone.
#
#   make demo         train handwritten digits through a remote Adam and compare with torch's own
#   make test         every check, then the tests against the built wheel
#   make integration  PyTorch Lightning and Hugging Face accelerate train with the built wheel, and as with torch's own;
#                     Prometheus watches a server, and is asked all that the dashboard and the alerts ask
#   make compose-test build the images, bring deploy/compose.yaml up, kill the server in it, and compare the weights
#   make fuzz         throw thousands of malformed and hostile messages at a server in which a job trains
#   make soak         kill servers and workers for a quarter of an hour, and compare every bit with undisturbed runs
#   make gpu-check    the CUDA tests and the benchmark against a server on a GPU; needs a machine with one
#   make check        the checks alone: formatting, lint, types, arrows, schema, generated code, the wheel's content
#   make proto        regenerate the code under proto/python/optimd/v1
#   make bench        step times beside those of optimd's peers, a slow line, memory, and what keeping jobs on disk costs
#   make clean        remove what the targets above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEEL_VENV := .venv-wheel
TRAINERS_VENV := .venv-integration
GENERATED := proto/python
PROTOS := $(wildcard proto/optimd/v1/*.proto)
SOURCES := client server proto/python/optimd/wire tests benchmarks examples tools

.DEFAULT_GOAL := help
.PHONY: help demo test integration compose-test fuzz soak gpu-check check wheel proto bench clean

help:
	@sed -n 's/^#   //p' Makefile

# pip rather than uv: the constraints pin torch's CPU build where the index offers one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,demo,bench,dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/optimd demo

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

proto: $(VENV)/.installed
	$(BIN)/python tools/generate_proto.py --out $(GENERATED)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	$(BIN)/python tools/generate_proto.py --out $(GENERATED) --check

# A second environment that sees the first one's dependencies but not its editable optimd, so that the tests
# meet the wheel as a user would.
wheel: $(VENV)/.installed
	rm -rf dist && $(BIN)/python -m build --quiet --no-isolation --wheel --sdist
	rm -rf $(WHEEL_VENV) && $(PYTHON) -m venv --without-pip $(WHEEL_VENV)
	$(BIN)/python tools/link_dependencies.py --from $(VENV) --to $(WHEEL_VENV)
	$(BIN)/python -m pip --python $(WHEEL_VENV)/bin/python install --quiet --disable-pip-version-check --no-deps dist/optimd-*.whl

# Three at a time: on two cores, much of the time goes into waiting for processes to start and leases to end.
test: check wheel
	$(WHEEL_VENV)/bin/python -m pytest --against-wheel -n 3 $(PYTEST_ARGS)

# The trainers have an environment of their own, which sees the first one's dependencies too: torch is there once, and
# nothing else is tested in their company.
integration: wheel
	rm -rf $(TRAINERS_VENV) && $(PYTHON) -m venv --without-pip $(TRAINERS_VENV)
	$(BIN)/python tools/link_dependencies.py --from $(VENV) --to $(TRAINERS_VENV)
	$(BIN)/python -m pip --python $(TRAINERS_VENV)/bin/python install --quiet --disable-pip-version-check \
		-c constraints.txt "$$(echo dist/optimd-*.whl)[integration]"
	$(TRAINERS_VENV)/bin/python -m pytest --against-wheel tests/trainers $(PYTEST_ARGS)
	$(WHEEL_VENV)/bin/python -m pytest --against-wheel tests/observability tests/pages $(PYTEST_ARGS)

# Needs a Docker engine, and to be allowed to kill what runs in it.
compose-test: $(VENV)/.installed
	$(BIN)/python -m pytest -s tests/compose $(PYTEST_ARGS)

FUZZ_EXAMPLES ?= 3000
fuzz: wheel
	OPTIMD_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(WHEEL_VENV)/bin/python -m pytest --against-wheel --timeout 3600 tests/fuzz $(PYTEST_ARGS)

soak: wheel
	$(WHEEL_VENV)/bin/python -m pytest --against-wheel -s tests/soak $(PYTEST_ARGS)

# With whatever torch is there: the pinned one is built for CPUs. GPU_PYTHON names an interpreter that has it, and optimd.
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-check: torch sees no CUDA device")'
	$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)
	$(GPU_PYTHON) -m benchmarks --device cuda:0 $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(WHEEL_VENV) $(TRAINERS_VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
