# setup | demo | test | bench | report | lint
# An active environment with torch >= 2.9 is used as it is; otherwise .venv is made from
# constraints.txt.

VENV ?= .venv
ACTIVE ?= $(shell python3 -c "from importlib.metadata import version; \
	release = tuple(map(int, version('torch').split('.')[:2])); \
	print('yes' if release >= (2, 9) else '')" 2>/dev/null)
EXTRAS := data,train,eval,gpu,jax,tpu,integrations,onnx,test
# they ask for torchvision, which does not load beside a CPU torch, or (flax) for stores of
# checkpoints; what is tested of them needs none
APART := timm open_clip_torch ftfy wcwidth lightly lightly-utils flax msgpack treescope
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.py')

ifeq ($(ACTIVE),yes)
PYTHON := python3
INSTALL := $(PYTHON) -m pip install --quiet
INSTALLED := $(shell python3 -c "import sys; print(sys.prefix)")/.vatt_fast_installed
APART :=
else
PYTHON := $(VENV)/bin/python
INSTALL := $(PYTHON) -m pip install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.vatt_fast_installed
endif

CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)

.PHONY: setup demo test bench report lint

setup: $(INSTALLED)

ifneq ($(ACTIVE),yes)
$(PYTHON):
	python3 -m venv $(VENV)
$(INSTALLED): | $(PYTHON)
endif

$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(INSTALL) --editable ".[$(EXTRAS)]"
	$(if $(APART),$(INSTALL) --no-deps $(APART))
	touch $@

demo: setup
	$(PYTHON) -m vatt_fast.cli demo

test: setup
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

bench: setup
	$(PYTHON) -m pytest bench --benchmark-autosave
	$(PYTHON) -m bench

report: setup
	$(PYTHON) -m bench report

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "import clang_format; clang_format.clang_format()" --dry-run --Werror $(CPP)
	$(PYTHON) -m mypy
