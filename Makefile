# What a person and CI run. `make run` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test test-fast robustness signals kills serving audit lint coverage docs lock clean
run: $(VENV)/.installed
	$(BIN)/fluxrun $(ARGS)

# Two at a time; who has nothing left takes half of what the other has. Compiled code is kept in .test_cache: only the
# first time on a machine is compiled cold.
test: $(VENV)/.installed lint
	$(BIN)/pytest -q -n 2 --dist worksteal

# For while you write: all but what is marked slow: compiling, processes of their own, what tries to break it.
# Unit tests of every package and runs of the tiny model are in it. What it leaves out `make test` runs.
test-fast: $(VENV)/.installed
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not slow"

# Thousands of broken command lines, config files, prompts, pictures, records and checkpoints: 2,000 of each kind take
# about an hour. ARGS="--seed 12 --cases 500 records" repeats a seed or narrows it down.
robustness: $(VENV)/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/campaign.py $(ARGS)

# Ctrl+C and SIGTERM at random moments through a real pty: seconds until the process has ended, exit codes, records, children.
# 100 signals take about a quarter of an hour on two cores that do nothing else. ARGS="--count 20 --seed 12 compile joblib".
signals: $(VENV)/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/signals_campaign.py $(ARGS)

# SIGKILL at 200 random moments of runs, sweeps, isolated jobs and compiling: what is on the disk is whole, nobody is left,
# a sweep goes on. About half an hour. ARGS="--count 20 --seed 12 sweep" as above.
kills: $(VENV)/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/signals_campaign.py --kill --count 200 \
	  --output build/kills.json $(ARGS)

# A warm server under use, a crowd and attack: every option group changed once, memory over 300 requests, client against
# plain run, 100 requests at once with 20 that go away, 500 hostile ones. ARGS="hostile --seed 12" picks a part.
serving: $(VENV)/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python scripts/serving.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks training scripts docs integrations
	$(BIN)/ruff format --check src tests benchmarks training scripts docs integrations
	$(BIN)/mypy
	$(BIN)/lint-imports

# The whole suite once more, measured: which lines of src no test runs, child processes included. Fails below what
# [tool.coverage.report] asks for. Takes about half as long again as `make test`, and is no part of it.
coverage: $(VENV)/.installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 2 --dist worksteal
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# Known vulnerabilities of what the lock names (needs pip-audit and its data), else versions and licences as a table.
audit: $(VENV)/.installed
	$(BIN)/python scripts/audit.py

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
	rm -rf $(VENV) build dist .test_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
