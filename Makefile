# make install | demo | test | soak | matrix | sanitize | lint | bench | train
PYTHON ?= python3
PIP_ARGS ?=
TRAIN_STEPS ?= 1700

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test soak matrix sanitize lint bench train

install: $(INSTALLED)

# Always through the constraints: a loose torch pin can pull gigabytes of GPU libraries. By a .pth
# file, since a script beside the clone takes the clone's folder for the package otherwise.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt $(PIP_ARGS) --config-settings editable_mode=compat -e ".[dev]"
	touch $@

demo: install
	$(BIN)/folospec demo

# One torch thread per worker: two workers that each spin two threads on two cores take twice as long.
test: export OMP_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# Long forms of the tests that run under load: threads, servers, fuzz.
soak: export OMP_NUM_THREADS := 1
soak: export TOKENIZERS_PARALLELISM := false
soak: install
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

# The suite under every setting that no test may depend on: hours. MATRIX_ARGS="--only openblas".
matrix: install
	$(BIN)/python tests/matrix.py $(MATRIX_ARGS)

# The tests of the native kernels, built with sanitizers. SANITIZE_ARGS: other tests than these.
sanitize: install
	$(BIN)/python tests/sanitizers.py $(SANITIZE_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.engine.throughput $(BENCH_ARGS)

# Resumes from build/demo/checkpoint.pt; remove build/demo to start anew.
train: install
	$(BIN)/python training/train.py --steps $(TRAIN_STEPS)
	$(BIN)/python training/export.py
	$(BIN)/python training/evaluate.py
