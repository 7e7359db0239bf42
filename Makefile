# Two commands from a fresh clone, each doing all of its own set-up in .venv:
#   make demo    train two models on real images, quantize them for every backend, compare
#   make test    ruff, mypy and pytest
# To choose a build of torch (on Linux the default one may bring CUDA along):
#   make demo TORCH_INSTALL_ARGS="--index-url URL_OF_THE_CPU_BUILDS"

PYTHON ?= python3
TORCH_INSTALL_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n auto

# threads that wait do not spin: several times faster where other processes want the cores too
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
INSTALLED := .venv/installed
# mypy follows folders, not package-dir: the source tree as it is imported, fxq with passes and backends inside
TYPED_TREE := .cache/typed

.PHONY: help demo test lint types clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	rm -rf $(TYPED_TREE)
	mkdir -p $(TYPED_TREE)/fxq
	ln -s $(CURDIR)/fxq/* $(CURDIR)/passes $(CURDIR)/backends $(TYPED_TREE)/fxq
	MYPYPATH=$(TYPED_TREE) $(BIN)/mypy -p fxq

# torch first and torchvision without its dependencies, so that nothing replaces the chosen build of torch
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch $(TORCH_INSTALL_ARGS)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
