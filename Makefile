# Everything starts here: `make demo` on a machine with Python 3.11, git and make only. `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test peers lab lint clean chromium

# The first Python that fits the pinned packages; another one: make PYTHON=/path/to/python3.11
PYTHON ?= $(shell for python in python3.11 python3 python3.12; do $$python -c \
	'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# MindSpore prints errors only
export GLOG_v := 3

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

venv: $(BIN)/.ready  ## set up .venv with the pinned packages (3.4 GB, two minutes)

$(BIN)/.ready: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 with venv found. Install it (Debian: apt-get install python3.11-venv)" \
	    "or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@echo "Setting up .venv with $$($(PYTHON) --version): two minutes the first time"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv  ## run the seven notebooks on the tiny model, results in output/demo/ (4 minutes)
	@$(BIN)/python -m glm3kit demo

test: venv chromium lint  ## run every test: unit, notebooks, browser
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder \
	  -m "not browser and not peers and not slow"
	$(BIN)/python -m pytest -p no:cacheprovider --nbval --nbval-current-env --nbval-cell-timeout=1200 \
	  --nbval-sanitize-with=tests/nbval_sanitize.cfg notebooks
	$(if $(wildcard tests/browser),$(BIN)/python -m pytest -m browser tests/browser)

peers: $(BIN)/.peers  ## compare with PyTorch and Transformers (a smaller torch: PIP_EXTRA_INDEX_URL, see CONTRIBUTING.md)
	$(BIN)/python -m pytest -m peers

$(BIN)/.peers: $(BIN)/.ready
	@echo "Adding torch and transformers to .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,peers]'
	@touch $@

lab: venv  ## open JupyterLab on the notebooks (this machine only, token on)
	@$(BIN)/python -m jupyterlab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

lint: venv  ## check the style with ruff
	@$(BIN)/ruff check .

clean:  ## remove .venv, output and caches
	rm -rf .venv output build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The browser test drives Debian's chromium; the fonts make Chinese text visible in its screenshots.
chromium:
	@if [ -x /usr/bin/chromium ]; then :; \
	elif command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || command -v sudo >/dev/null; }; then \
	  echo "Installing chromium and fonts-noto-cjk for the browser test"; \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$as_root apt-get update -qq && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium fonts-noto-cjk >/dev/null; \
	else echo "No /usr/bin/chromium, and no apt-get with root rights to install it: the browser test will fail." \
	  "Install chromium and fonts-noto-cjk, or run the others: $(BIN)/python -m pytest -m 'not browser'" >&2; fi
