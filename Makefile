# Everything a newcomer needs is `make run` and `make test`; both set up the virtual environment when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test check format bench bench-smoke gpu chaos fuzz clean

setup: .venv/.ok

.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pipefleet needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: .venv/.ok  ## start a fleet on this machine and run two real bulk jobs on it
	$(BIN)/pipefleet demo

test: .venv/.ok  ## every test, with real servers and tiny models
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.ok  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ok
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.ok  ## throughput against hand-written loops, transformers' pipeline and peers; `--help` tells how long it takes
	$(BIN)/python -m tests.benchmarks

gpu: .venv/.ok  ## checks and benchmark on a CUDA device, at most six minutes; DEVICE=cpu rehearses them
	$(BIN)/python -m tests.gpu --device $(or $(DEVICE),cuda:0) --out $(or $(OUT),gpu-results)

bench-smoke: .venv/.ok  ## only whether the outputs of all of them agree; under a minute
	$(BIN)/python -m tests.benchmarks.smoke

chaos: .venv/.ok  ## every delivery guarantee with processes that are killed, paused and cut off; takes about half an hour
	$(BIN)/python -m tests.chaos

fuzz: .venv/.ok  ## 20,000 hostile messages against one worker process; `--help` tells of seeds and families
	$(BIN)/python -m tests.fuzz --messages 20000

clean:
	rm -rf .venv .pipefleet .pytest_cache .mypy_cache .ruff_cache .hypothesis
