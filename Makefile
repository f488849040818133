# Everything a fresh machine needs: python >= 3.10 with venv, make, a C++ compiler (Inductor's).
# Each target makes .venv (for another torch or Python one named after it), installs what is missing, and runs there.

PYTHON ?= python3
# The torch that everything runs on: the newest that is tested, unless another is asked for, as in
# `make test TORCH=2.13.0`, which gets an environment of its own beside the other, as does another PYTHON.
NEWEST := $(shell sed -n '/^torch==/{s///;s/;.*//;p;q}' requirements.txt)
OLDEST := $(shell sed -n 's/^dependencies = .*torch>=\([0-9.]*\).*/\1.0/p' pyproject.toml)
TORCH := $(NEWEST)
VENV := .venv$(addprefix -,$(filter-out $(NEWEST),$(TORCH)) $(notdir $(filter-out python3,$(PYTHON))))
VENV := $(subst $() ,,$(VENV))
BIN := $(VENV)/bin
# Packages that ask for versions of others, or for a torch, that do not fit the rest: installed beside it, without
# what they ask for (the extra "e2e" brings the rest of that), and seen by the tests in tests/e2e/apart only.
# torchvision 0.28 is made for torch 2.13, 0.29 for 2.14; a new torch has to do with the newest there is.
APART := "litgpt>=0.5.13" timm "torchtune>=0.6.1" "torchao==0.11.0" "torchtitan==0.3.*" "spmd_types==0.2.3" \
	"torchvision<0.$(shell expr $(word 2,$(subst ., ,$(TORCH))) + 16)"
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(sort $(shell find fusion_pass lowering kernels -name "*.py"))

.PHONY: test fast oldest pythons some lint types pytest e2e demo docs bench clean FORCE

# Linting takes a second; mypy keeps to one core for longer, so the tests begin beside it.
test: $(VENV)/.installed
	$(MAKE) --jobs 2 lint types pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Two workers, handed tests as they get free: a test that compiles takes seconds, most take milliseconds. Those that
# share something stay together, the long ones come first (tests/order.py).
SHARED := -n 2
pytest: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(SHARED) --durations 15

# What depends most on torch: the graphs that Dynamo makes, the rules that read them, tensors that stand for logits.
FAST := $(addprefix tests/,compat graph ir rules canonicalize analysis legality rewrite deferred report inductor programs \
	packaging test_backend.py test_pipeline.py test_user_surface.py)
fast: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(SHARED) --durations 15 $(FAST)

# The same on the oldest torch that the package allows.
oldest:
	$(MAKE) fast TORCH=$(OLDEST)

# Import, packaging and what is used of torch, with every Python that the machine has, and what can be said of the others:
# whether the syntax and the standard library are theirs.
pythons: $(VENV)/.installed
	for minor in 10 11 12 13 14; do \
		if python3.$$minor -c "" 2>/dev/null; then $(MAKE) some PYTHON=python3.$$minor || exit 1; \
		else $(BIN)/ruff check --target-version py3$$minor --select E9,F . && $(BIN)/mypy --python-version 3.$$minor || exit 1; fi; done
some: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/compat tests/packaging tests/programs/test_whole_stack.py

# Training programs of real packages, three ways each (tests/e2e/README.md).
e2e: $(VENV)/.e2e
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 0 tests/e2e tests/parallel
	PYTHONPATH=$(VENV)/apart $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 0 tests/e2e/apart

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# The documentation, into build/docs. Warnings are errors. Its environment has no torch: nothing is imported.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	PYTHONWARNINGS=ignore .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-* build dist *.egg-info fusedhead.egg-info

# torch comes first and alone: what follows accepts any torch and must not choose another.
$(VENV)/.torch: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) $(if $(filter $(NEWEST),$(TORCH)),-r requirements.txt,"torch==$(TORCH)")
	touch $@

# An editable install in strict mode links file by file (pyproject.toml says why), so a new file needs a new install.
$(VENV)/.installed: $(VENV)/.torch $(VENV)/.sources pyproject.toml
	$(PIP) --no-build-isolation -e ".[test]" --config-settings editable_mode=strict
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[bench]" --config-settings editable_mode=strict
	touch $@

$(VENV)/.e2e: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[e2e]" --config-settings editable_mode=strict
	$(PIP) --no-deps --upgrade --target $(VENV)/apart $(APART)
	touch $@

$(VENV)/.sources: FORCE | $(VENV)/.torch
	@echo '$(SOURCES)' | cmp -s - $@ || echo '$(SOURCES)' > $@
