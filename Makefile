# What a developer runs. Steps leave stamps under .venv, so a second run does only what changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt $(wildcard */native/*.cc */native/*.h)
ENGINE := build/engines/smollm2
QUESTION ?= What is the capital of France?

.PHONY: run test sanitize lint typecheck format models bench venv view clean

run: $(VENV)/installed ## build an engine of a small model and ask it a question
	model=$$($(BIN)/python tools/dev/fetch_models.py smollm2); \
	if [ ! -f $(ENGINE)/manifest.json ]; then $(BIN)/trtllm-build "$$model" --output-dir $(ENGINE) --dequantize; fi
	$(BIN)/python examples/chat.py $(ENGINE) "$(QUESTION)"

test: $(VENV)/installed-test models lint sanitize ## lint, types, the C++ tests under sanitizers, and the tests
	$(BIN)/python -m pytest -n 2

# The runtime's core without Python: every C++ test under AddressSanitizer and UBSan, the executor's threads under
# ThreadSanitizer. TRTLLM_TEST_SCALE makes it 10,000 random sequences of operations on the cache and the scheduler.
sanitize: $(VENV)/created
	tools/dev/sanitize.sh address,undefined build/sanitize-address '_test$$'
	tools/dev/sanitize.sh thread build/sanitize-thread '^executor.*_test$$'

lint: $(VENV)/installed-test view
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/view/trtllm

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: $(VENV)/installed
	$(BIN)/python tools/dev/fetch_models.py

bench: $(VENV)/installed-bench models
	$(BIN)/python benchmarks/prepare_peers.py
	$(BIN)/python benchmarks/generation.py --build
	$(BIN)/python benchmarks/generation.py --json build/bench/generation.json

view: $(VENV)/installed
	$(BIN)/python tools/dev/link_view.py

venv: $(VENV)/installed

# The build tools are installed beside the package and used without a build environment of pip's own, so that a change
# of one C++ file compiles one C++ file. The dependencies come in a second step, because they may need such environments;
# by then the package is there, and pip reads its requirements and extras from it.
$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "scikit-build-core>=1.1" "nanobind>=2.4" "cmake>=3.18" ninja
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml $(NATIVE)
	PATH="$$PWD/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps --editable .
	$(PIP) install trtllm-toolchain
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install "trtllm-toolchain[test]"
	touch $@

# llama.cpp is compiled for this machine: its ready wheels stop at AVX2 and would be an unfair peer.
$(VENV)/installed-bench: $(VENV)/installed
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PIP) install --no-binary llama-cpp-python llama-cpp-python
	$(PIP) install "trtllm-toolchain[bench]"
	touch $@

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
