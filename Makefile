# make demo   a picture from the embedded model, from nothing
# make test   everything that CI runs
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DEBIAN := fonts-noto-color-emoji libfribidi0
ifneq ($(wildcard ../shared),)
export LATENTPIPE_ASSETS ?= $(abspath ../shared)
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types clean

demo: $(VENV)/.installed
	$(BIN)/latentpipe generate "red apple" --seed 7 --out out

test: $(VENV)/.dev debian
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# torch, by far the largest part, comes first; Debian's Python without ensurepip gets pip from the one it runs
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

.PHONY: debian
debian:
	@if dpkg -s $(DEBIAN) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq $(DEBIAN); \
	else echo "note: tests that render emoji skip without: $(DEBIAN)"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info
