# Everything a fresh machine needs: python >= 3.10 with venv, make, a C++ compiler (Inductor's).
# Each target makes .venv, installs into it what is missing, and runs there.

PYTHON ?= python3
BIN := .venv/bin
# torch without a GPU: the version that is tested on the CPU. With one: the newest, which brings its own triton.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
# Packages that ask for versions of others, or for a torch, that do not fit the rest: installed beside it, without
# what they ask for (the extra "e2e" brings the rest of that), and seen by the tests in tests/e2e/apart only.
APART := "litgpt>=0.5.13" timm "torchtune>=0.6.1" "torchao==0.11.0" \
	$(if $(shell command -v nvidia-smi),torchvision,torchvision==0.28.0)
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(sort $(wildcard fusion_pass/*.py fusion_pass/*/*.py lowering/*.py kernels/*.py))

.PHONY: test lint types pytest e2e demo bench clean FORCE

test: lint types pytest

lint: .venv/.installed
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/mypy

# Two workers, handed single tests as they get free: a test that compiles takes seconds, most take milliseconds.
pytest: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 15

# Training programs of real packages, three ways each (tests/e2e/README.md).
e2e: .venv/.e2e
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 0 tests/e2e
	PYTHONPATH=.venv/apart $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 0 tests/e2e/apart

demo: .venv/.installed
	$(BIN)/python examples/demo.py

bench: .venv/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist *.egg-info fusedhead.egg-info

# torch comes first and alone: what follows accepts any torch and must not choose another.
.venv/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) "$(TORCH)"
	touch $@

# An editable install in strict mode links file by file (pyproject.toml says why), so a new file needs a new install.
.venv/.installed: .venv/.torch .venv/.sources pyproject.toml
	$(PIP) --no-build-isolation -e ".[test]" --config-settings editable_mode=strict
	touch $@

.venv/.bench: .venv/.installed
	$(PIP) --no-build-isolation -e ".[bench]" --config-settings editable_mode=strict
	touch $@

.venv/.e2e: .venv/.installed
	$(PIP) --no-build-isolation -e ".[e2e]" --config-settings editable_mode=strict
	$(PIP) --no-deps --upgrade --target .venv/apart $(APART)
	touch $@

.venv/.sources: FORCE | .venv/.torch
	@echo '$(SOURCES)' | cmp -s - $@ || echo '$(SOURCES)' > $@
