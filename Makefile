# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV   ?= .venv
# The newest Python that is really there (a shim of pyenv may only have the name) and can make an environment.
# Not 3.14: the tests run on 3.11 to 3.13.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && \
	echo $$python && break; done)
RUN    := $(VENV)/bin/python
INSTALLED := setup.cfg setup.py pyproject.toml $(wildcard qpde/native/*.cpp qpde/native/*.h)
JOBS   ?= 2

.PHONY: demo test test-fast durations lint docs bench clean

# The main job on embedded data: symmetric and plain nets in 4 bits, their table, and the page of their report.
demo: $(VENV)/.train
	$(RUN) -m train run configs/digits.py
	$(RUN) -m train report runs/digits

test: lint
	$(RUN) -m pytest -n $(JOBS) --dist worksteal

# What says most in two minutes; tests/slow.txt lists what is left out.
test-fast: $(VENV)/.test
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# Measures every test, alone on one core, and writes tests/slow.txt.
durations: $(VENV)/.test
	$(RUN) -m pytest -p tests.durations

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m mypy

# The site, in docs/_build/html. Warnings are errors, broken links between its pages too.
docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

# One question per file; each prints ratios measured side by side in one process.
bench: $(VENV)/.bench
	for file in benchmarks/[a-z]*.py; do $(RUN) $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist docs/_build qpde/native/*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11, 3.12 or 3.13 with its venv module: install one, or give make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.train: $(INSTALLED) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/.test: $(INSTALLED) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train,test]'
	touch $@ $(VENV)/.train

$(VENV)/.docs: $(INSTALLED) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train,docs]'
	touch $@ $(VENV)/.train

$(VENV)/.bench: $(INSTALLED) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train,test,bench]'
	touch $@
