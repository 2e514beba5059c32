# From a Python >= 3.11, its pip, and make: `make demo` runs the main job, `make test` the tests.
# The environment is made once in $(VENV) and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
# worksteal: neighbours run in one process, which has compiled much of what they need.
TEST_FLAGS ?= -n 2 --dist worksteal

.PHONY: demo test lint types wheel clean

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/digits.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/.dev
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The wheel, installed where there is nothing else, imports and passes its doctests.
wheel: $(VENV)/.dev
	rm -rf $(DIST) $(VENV)-wheel
	$(VENV)/bin/python -m build --wheel --outdir $(DIST)
	$(PYTHON) -m venv --without-pip $(VENV)-wheel
	$(PYTHON) -m pip --python $(VENV)-wheel/bin/python install $(DIST)/*.whl
	$(VENV)-wheel/bin/python -I .ci/doctests.py
	rm -rf $(VENV)-wheel

# pip of the Python at hand fills the environment, so that venv needs no pip of its own to copy:
# some systems ship one without the other.
$(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV)/bin/python install pip -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel $(DIST)
