# `make quickstart` and `make test` do all set-up on a fresh machine; PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/quickstart

.PHONY: quickstart test tiny-weights install clean

quickstart: $(INSTALLED)
	$(BIN)/spatialt2i quickstart --run $(RUN)

test: $(INSTALLED)
	$(BIN)/python -m pytest

tiny-weights: $(INSTALLED)
	$(BIN)/python scripts/tiny_weights.py

install: $(INSTALLED)

# Installed once; again only when the pins or the package's metadata change.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV)
