# What a person and CI run. `make run` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test robustness lint docs lock clean
run: $(VENV)/.installed
	$(BIN)/fluxrun $(ARGS)

test: $(VENV)/.installed lint
	$(BIN)/pytest -q -n 2 --dist loadfile

# Thousands of broken command lines, config files, prompts, pictures, records and checkpoints: 2,000 of each kind take
# about an hour. ARGS="--seed 12 --cases 500 records" repeats a seed or narrows it down.
robustness: $(VENV)/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/campaign.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks training
	$(BIN)/ruff format --check src tests benchmarks training
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python docs/reference.py

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

# Write the lock from the venv as it is. torch stays a plain version: the same pin gives a GPU machine its CUDA build.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --exclude fluxrun \
	  | sed -E 's/^torch==([0-9.]+).*/torch==\1/' > requirements.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
