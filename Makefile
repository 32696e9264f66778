# Every target works from a fresh clone with Python >= 3.10, a C++17 compiler and make: it creates
# .venv, installs there what it needs and builds the libraries. What is up to date stays.
#
#   PYTHON=python3.12              the interpreter of a new .venv
#   TORCH='torch==2.11.0'          another torch, or other arguments of pip install; kept in .venv/torch.txt for the next make
#   VERSION=2.11.0                 the torch of make test-torch
#   PYTEST_ARGS='-k softmax'       what make test and test-torch pass to pytest besides
#   PEERS=1                        make bench measures JAX and TensorFlow too, in .venv-peers
#   FUZZ_ARGS='--seed 1'           what make fuzz passes to tests/fuzz/run.py besides
#   BENCH_ARGS='--threads 1'       what make bench and bench-gpu pass to benchmarks/bench.py besides
#   GPU_TIMES_ARGS='--case f32'    what make gpu-times passes to the program

PYTHON ?= python3
VERSION ?=
PYTEST_ARGS ?=
FUZZ_ARGS ?=
PEERS ?=
BENCH_ARGS ?=
GPU_TIMES_ARGS ?=

VENV := .venv
# What was chosen last, until another is given.
TORCH := $(or $(TORCH),$(shell cat $(VENV)/torch.txt 2>/dev/null),torch==2.13.0)
VENV_PEERS := .venv-peers
VENV_AUDIT := .venv-audit
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The version of every tool; torch's is TORCH.
CONSTRAINTS := --constraint constraints.txt
# In a plain .pth file: the finder that pip installs otherwise answers for softmax_ext._C in any copy of the package too.
EDITABLE := $(PIP) install $(CONSTRAINTS) --no-build-isolation --config-settings editable_mode=compat --editable
CPP = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_CPP = $(shell find tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build cuda-library demo test check test-torch test-emulated cuda-check test-gpu bench bench-linear bench-quick bench-gpu gpu-times accuracy lint format dist wheel audit clean large training sanitize native test-isas old-cpu trust fuzz distclean FORCE

help: ## this list, and below it what can be given to them
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

build: $(VENV)/.built ## build the libraries into softmax_ext/

cuda-library: $(VENV)/.built ## compile the CUDA library too, with nvcc and no GPU, whatever torch is installed
	FORCE_CUDA=1 $(BIN)/python setup.py build_ext

demo: $(VENV)/.demo $(VENV)/.built ## train two models with it and with torch; draws demo/report.png
	$(BIN)/python examples/report.py

test: $(VENV)/.test $(VENV)/.built ## run the tests, but for those marked slow; six minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(PYTEST_ARGS)

check: $(VENV)/.test $(VENV)/.integrations $(VENV)/.built ## what CI runs besides: slow tests, other libraries, sanitizers, the emulator, every GPU architecture, sdist, wheel
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/integrations
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow
	$(BIN)/python tests/tools/kernel_suite.py sanitized --sample 8 -n 2 -q
	$(BIN)/python tests/native/run.py --trials 25 thread
	$(BIN)/python tests/emulator/run.py -n 2
	$(BIN)/python tests/gpu/cuda_check.py --skip-without-nvcc
	$(MAKE) dist wheel

# What depends on torch's version: its compiler, transforms and autograd, what it says, and whether the libraries load.
VERSIONED := compile $(patsubst %,unit/test_%.py,transforms linear linear_rows inplace integration errors modules patch torch_function flops) package/test_diagnostics.py

# The library is the one of .venv: built with one torch it serves every other, which is a part of what this tests.
test-torch: $(VENV)-torch-$(VERSION)/.installed $(VENV)/.built ## run what depends on the torch with VERSION=2.11.0, in .venv-torch-2.11.0
	$(VENV)-torch-$(VERSION)/bin/python -m pytest -n 2 $(VERSIONED:%=tests/%) $(PYTEST_ARGS)

large: $(VENV)/.test $(VENV)/.built ## run the tests of more than 2^31 logits; takes 15 GiB of memory
	$(BIN)/python -m pytest --large $(PYTEST_ARGS) tests/stress/test_size.py

test-emulated: $(VENV)/.test $(VENV)/.built ## run the CUDA kernels on the CPU, without a GPU; part of make check
	$(BIN)/python tests/emulator/run.py -n 2

cuda-check: $(VENV)/.test $(VENV)/.built ## compile the CUDA kernels for every architecture, read registers and spills; part of make check
	$(BIN)/python tests/gpu/cuda_check.py

fuzz: $(VENV)/.test $(VENV)/.built ## 20000 drawn calls against torch in float64; make test has 2000 of a fixed seed
	$(BIN)/python tests/fuzz/run.py -n 2 $(FUZZ_ARGS)

test-gpu: $(VENV)/.test $(VENV)/.built ## run the tests on CUDA tensors, and some under compute-sanitizer
	$(BIN)/python -m pytest --device cuda $(PYTEST_ARGS)
	$(BIN)/python tests/gpu/sanitize_gpu.py

sanitize: $(VENV)/.test $(VENV)/.built ## run the tests of the CPU kernels under AddressSanitizer and UBSan; a sample is part of make check
	$(BIN)/python tests/tools/kernel_suite.py sanitized -n 2 $(PYTEST_ARGS)

native: $(VENV)/.built ## run the kernels without torch: plain, under AddressSanitizer and UBSan, under ThreadSanitizer (part of make check)
	$(BIN)/python tests/native/run.py

test-isas: $(VENV)/.test $(VENV)/.built ## run the tests of the CPU kernels with each kernel set that this processor has
	$(BIN)/python tests/tools/kernel_suite.py isas -n 2 $(PYTEST_ARGS)

old-cpu: $(VENV)/.built ## run a wheel and the kernels on emulated CPUs: Nehalem, Haswell, ARM (needs qemu-user, g++-aarch64-linux-gnu)
	$(BIN)/python tests/package/old_cpu.py
	$(BIN)/python tests/native/run.py Nehalem Haswell aarch64

trust: sanitize native test-isas old-cpu fuzz large accuracy training audit ## everything that takes longer than CI has

bench: $(VENV)/.bench $(VENV)/.built $(if $(PEERS),$(VENV_PEERS)/.installed) ## measure against torch and others; fills benchmarks/results/
	$(BIN)/python benchmarks/bench.py $(if $(PEERS),--peers $(VENV_PEERS)/bin/python) $(BENCH_ARGS)

bench-linear: $(VENV)/.bench $(VENV)/.built ## measure linear cross entropy; fills benchmarks/results/linear.*
	$(BIN)/python benchmarks/bench.py --op linear $(BENCH_ARGS)

bench-quick: $(VENV)/.bench $(VENV)/.built ## a few ratios against torch, in a minute; writes nothing
	$(BIN)/python benchmarks/bench.py --quick $(BENCH_ARGS)

bench-gpu: $(VENV)/.bench $(VENV)/.built ## measure on a GPU against torch and others; fills benchmarks/results/
	$(BIN)/python benchmarks/bench.py --device cuda $(BENCH_ARGS)

# Neither torch nor .venv: nvcc compiles the kernels once more, for the GPU that is here or TORCH_CUDA_ARCH_LIST.
GPU_TIMES := build/gpu_times
GPU_TIMES_SOURCES := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp) benchmarks/gpu_times/main.cu
GPU_TIMES_OBJECTS := $(GPU_TIMES_SOURCES:%=$(GPU_TIMES)/%.o)

gpu-times: ## time every CUDA kernel by itself beside a copy, and check it, without torch
	+TORCH_CUDA_ARCH_LIST='$(GPU_LIST)' $(MAKE) --no-print-directory -j$$(nproc) $(GPU_TIMES)/gpu_times
	$(GPU_TIMES)/gpu_times $(GPU_TIMES_ARGS)

accuracy: $(VENV)/.test $(VENV)/.built ## errors in ULP beside torch's; fills the tables of docs/accuracy.md
	$(BIN)/python benchmarks/studies/accuracy.py

training: $(VENV)/.demo $(VENV)/.bench $(VENV)/.built ## train a GPT with each way to compute the loss, a quarter of an hour; fills docs/training.md
	$(BIN)/python benchmarks/studies/training.py

lint: $(VENV)/.lint ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(TEST_CPP)
	$(BIN)/mypy --strict softmax_ext

format: $(VENV)/.lint ## reformat the Python and C++ sources in place
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

NVCC = $(or $(wildcard $(CUDA_HOME:%=%/bin/nvcc)),$(shell sh -c 'command -v nvcc'),$(wildcard /usr/local/cuda/bin/nvcc),nvcc)
GPU_LIST = $(or $(TORCH_CUDA_ARCH_LIST),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u),9.0)
GPU_NUMBERS = $(subst .,,$(patsubst %+PTX,%,$(subst ;, ,$(GPU_LIST))))
GPU_TIMES_FLAGS = -std=c++17 -O3 -Xcompiler=-Wall,-Wextra $(foreach n,$(GPU_NUMBERS),-gencode=arch=compute_$n,code=sm_$n)

$(GPU_TIMES)/gpu_times: $(GPU_TIMES_OBJECTS)
	$(NVCC) $^ -o $@

$(GPU_TIMES)/%.o: % $(GPU_TIMES)/flags
	@mkdir -p $(@D)
	$(NVCC) $(GPU_TIMES_FLAGS) -DSOFTMAX_EXT_CUDA_ARCHITECTURES='"$(GPU_NUMBERS)"' -MD -MP -MF $@.d -c $< -o $@

# Another file when they change.
$(GPU_TIMES)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(NVCC) $(GPU_TIMES_FLAGS)' | cmp -s - $@ || echo '$(NVCC) $(GPU_TIMES_FLAGS)' > $@

-include $(GPU_TIMES_OBJECTS:=.d)

# The time of every file in them: 1980, the earliest that a wheel can hold.
dist wheel: export SOURCE_DATE_EPOCH ?= 315532800

dist: $(VENV)/.dist ## an sdist in dist/, of the same bytes every time
	.ci/make_sdist $(BIN)/python

wheel: $(VENV)/.dist ## a wheel in dist/ for every Python and torch, with the CUDA kernels where there is an nvcc
	$(BIN)/python .ci/make_wheel.py

audit: $(VENV_AUDIT)/.installed $(VENV)/torch.txt ## ask for known vulnerabilities of torch and every pinned version
	$(VENV_AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt \
		--requirement benchmarks/requirements-peers.txt --requirement $(VENV)/torch.txt

clean: ## remove everything built; keep .venv
	rm -rf build dist demo *.egg-info softmax_ext/*.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find softmax_ext tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV) $(VENV_PEERS) $(VENV_AUDIT) $(VENV)-torch-*

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("softmax_ext needs Python" \
		" >= 3.10; $(PYTHON) is " + sys.version.split()[0] + ". Try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The value of TORCH that .venv was made with: written anew, and so newer, only when it changes.
$(VENV)/torch.txt: FORCE | $(VENV)/pyvenv.cfg
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/.tools: $(VENV)/torch.txt constraints.txt
	$(PIP) install $(CONSTRAINTS) --upgrade $(TORCH) setuptools ninja pybind11
	touch $@

# By setup.py itself, since pip hides the plan and the progress.
$(VENV)/.built: $(VENV)/.tools setup.py $(wildcard build_support/*.py) pyproject.toml softmax_ext/_version.py $(CPP)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

# The package and one of the groups of pyproject.toml.
GROUPS := $(VENV)/.bench $(VENV)/.demo $(VENV)/.integrations $(VENV)/.test $(VENV)/.lint $(VENV)/.dist
$(GROUPS): $(VENV)/.%: $(VENV)/.tools pyproject.toml | $(VENV)/.built
	$(EDITABLE) '.[$*]'
	touch $@

# Another torch and the group "test", of which .venv has the list.
$(VENV)-torch-%/.installed: $(VENV)/.test constraints.txt
	test -d $(@D) || $(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'from importlib.metadata import requires; print(*(one.partition(";")[0] for one in \
		requires("softmax_ext") if "test" in one.partition("extra ==")[2]), sep="\n")' > $(@D)/requirements.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install $(CONSTRAINTS) torch==$* --requirement $(@D)/requirements.txt
	touch $@

$(VENV)-torch-/.installed:
	@echo 'make test-torch: of which torch? make test-torch VERSION=2.11.0' >&2; exit 1

# What softmax_ext is measured against besides torch, apart from it.
$(VENV_PEERS)/.installed: benchmarks/requirements-peers.txt
	test -d $(VENV_PEERS) || $(PYTHON) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/python -m pip --disable-pip-version-check install --requirement $<
	touch $@

# The auditor, apart from what it audits.
$(VENV_AUDIT)/.installed: Makefile
	test -d $(VENV_AUDIT) || $(PYTHON) -m venv $(VENV_AUDIT)
	$(VENV_AUDIT)/bin/python -m pip --disable-pip-version-check install pip-audit==2.10.1
	touch $@
