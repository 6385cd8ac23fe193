# make demo   a picture from the embedded model, from nothing
# make ui     the interface in a browser
# make test   all tests, in two processes; test-fast: without the slow ones; test-docs: the blocks of README and docs/ as they stand
# make docs   the pages in docs/ and the API reference, into docs/_build/html; a warning, a broken link or reference fails
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DEBIAN := fonts-noto-color-emoji libfribidi0 chromium
AXE := axe-core@4.14.1
ifneq ($(wildcard ../shared),)
export LATENTPIPE_ASSETS ?= $(abspath ../shared)
endif
# a file's tests stay together: they share what is dear to make
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo ui test test-fast test-docs test-avx2 lint types docs clean

demo: $(VENV)/.installed
	$(BIN)/latentpipe generate "red apple" --seed 7 --out out

ui: $(VENV)/.ui
	$(BIN)/latentpipe ui

test: $(VENV)/.dev $(VENV)/axe.min.js debian
	$(PYTEST)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not docs"

test-docs: $(VENV)/.dev
	$(BIN)/python -m pytest -m docs tests/test_docs.py

# what compares numbers, with the instructions of a processor without AVX-512
test-avx2: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "numeric and not docs"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html

# torch, by far the largest part, comes first; Debian's Python without ensurepip gets pip from the one it runs
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.ui: $(VENV)/.installed
	$(PIP) -e '.[ui]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# what the browser tests check accessibility with; they skip without
$(VENV)/axe.min.js: $(VENV)/.installed
	@cd $(VENV) && { npm pack --silent $(AXE) >/dev/null && tar xzf axe-core-*.tgz package/axe.min.js && mv package/axe.min.js . && touch axe.min.js; } \
	|| echo "note: no $(AXE) from npm; the accessibility tests skip"; rm -rf axe-core-*.tgz package

.PHONY: debian
debian:
	@if dpkg -s $(DEBIAN) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq $(DEBIAN); \
	else echo "note: tests that render emoji or use a browser skip without: $(DEBIAN)"; fi

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info
