# make demo   install, prepare the target, and compare the accelerated server with plain decoding
# make train-demo  answers, training with AUF, export, serving: tau before and after, in minutes
# make adapt-demo  a drafter learns from its own traffic and is swapped in: tau and speed before and after, in minutes
# make study-smoke  two training arms, two seeds, toy size: trained, served, compared, reported, in minutes
# make test   every test, end-to-end ones included, in WORKERS (2) processes
# make serve  the accelerated server (PROFILE=smollm2-135m, qwen3-8b or a file, ARGS="--set key=value")
# make bench  the tau benchmark against a running server (ARGS="--tasks gsm8k --limit 20")
# make soak   mixed load on a server for MINUTES (30), checked against plain decoding; nothing wrong, nothing leaked
# make fuzz   card, recipe, profile and JSONL parsing on INPUTS (25,000) inputs a test
# make audit  known vulnerabilities of the pinned packages, asked of PyPI
# make lint   ruff, mypy and the directions of imports
#
# The environment is .venv, or where VENV= says. It is made once, and anew where the pins or its place change.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= smollm2-135m
MINUTES ?= 30
INPUTS ?= 25000
WORKERS ?= 2
ifeq ($(strip $(PYTHON)),)
$(error found: PYTHON=""; expected: Python 3.11 or 3.12; to fix it: give its path, or leave PYTHON out)
endif
# Recipes name it without quotes, and one of them clears it.
ifneq ($(words [$(VENV)])$(if $(VENV),,none)$(strip $(foreach sign,* ? [ ~,$(findstring $(sign),$(VENV)))),1)
$(error found: VENV="$(VENV)"; expected: one path without spaces, *, ?, [ and ~; to fix it: give another, VENV=/path/to/venv)
endif
# The place counts too: programs of an environment that was moved begin with the path of a Python that is gone.
MADE_FOR := $(shell { cat pyproject.toml constraints.txt; realpath -m $(VENV); } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(MADE_FOR)
# Says that the directory is ours to clear. Earlier versions left $(VENV)/.linked-* alone.
MARK := .made-by-make
# One environment may serve several checkouts in turn: the package is linked anew when the checkout is another one.
LINK := $(VENV)/.linked-$(shell pwd | sha256sum | cut -c1-16)
BIN := $(VENV)/bin

.PHONY: demo train-demo adapt-demo study-smoke test serve bench soak fuzz audit lint env

env: $(LINK)

$(LINK): $(STAMP)
	rm -f $(VENV)/.linked-*
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# $(PYTHON) may be the environment's own. What made it is asked for before it is gone.
$(STAMP):
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), f"Python {sys.version.split()[0]} found, 3.11 or 3.12 needed; set PYTHON="'
	@test -e $(VENV)/$(MARK) || ls $(VENV)/.linked-* > /dev/null 2>&1 || test -z "$$(ls -A $(VENV) 2> /dev/null)" || { \
		echo 'found: $(VENV) holds files and no environment that this Makefile made; expected: an empty or absent' \
			'directory; to fix it: give another, VENV=/path/to/venv, or remove it yourself' >&2; exit 1; }
	mkdir -p $(VENV) && touch $(VENV)/$(MARK)
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && test -x "$$base" && \
		find -H $(VENV) -mindepth 1 -maxdepth 1 ! -name $(MARK) -exec rm -rf {} + && "$$base" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m benchmarks compare --profile smollm2-135m --tasks sample --limit 2 --max-tokens 128 --out runs/demo $(ARGS)

train-demo: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m benchmarks train-demo $(ARGS)

adapt-demo: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m benchmarks adapt-demo $(ARGS)

study-smoke: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m benchmarks study benchmarks/studies/smoke.yaml --out runs/study-smoke $(ARGS)

test: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=30 $(ARGS)

serve: env
	$(BIN)/python -m server --profile $(PROFILE) $(ARGS)

bench: env
	$(BIN)/python -m benchmarks run --base-url http://127.0.0.1:30000 $(ARGS)

soak: env
	$(BIN)/sglang-auf prepare smollm2-135m
	$(BIN)/python -m benchmarks soak --minutes $(MINUTES) $(ARGS)

fuzz: env
	AUF_FUZZ=$(INPUTS) $(BIN)/python -m pytest tests/fuzz $(ARGS)

# An environment of its own: the tool's dependencies are none of ours.
audit:
	$(PYTHON) -m venv --clear .audit
	.audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
