# From a Python >= 3.11, its pip, and make: `make demo` runs the main job, `make test` the tests,
# `make quick` some of them, in about a minute.
# The environment is made once in $(VENV) and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
SITE := $(addprefix docs/,_build api gallery made)
# worksteal: neighbours run in one process, which has compiled much of what they need.
TEST_FLAGS ?= -n 2 --dist worksteal

# The doctests, the arithmetic of trees, rows and products on the models that differ most, errors.
QUICK ?= pytree_grads $(addprefix tests/,trees/test_combine.py trees/test_vector.py \
	batches/test_per_example.py batches/test_errors.py jacobian/test_outputs.py \
	$(addprefix repo/test_,imports.py packaging.py help.py pages.py readme.py))
QUICK_MODELS ?= perceptron embeddings tied_embedding scan_over_layers complex_parameters \
	flax_nnx_batch_norm equinox haiku
QUICK += $(QUICK_MODELS:%=tests/jacobian/test_products.py::test_all_products[%])

# How long it takes is said first: the environment is made before, and pytest is silent for long.
ifneq ($(filter test,$(MAKECMDGOALS)),)
$(info make test: all tests take about 15 minutes on two idle cores, a new environment 1 or 2 more. make quick takes about 1.)
endif
ifneq ($(filter quick,$(MAKECMDGOALS)),)
$(info make quick: some of the tests take about 1 minute on two idle cores, a new environment 1 or 2 more. make test runs all.)
endif

.PHONY: demo test quick coverage lint types docs release-check clean

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/digits.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(TEST_FLAGS)

quick: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(TEST_FLAGS) $(QUICK:%='%')

# Which lines no test runs. On Python 3.12 and 3.13, COVERAGE_CORE=sysmon saves time.
coverage: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(TEST_FLAGS) --cov

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/.dev
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The site, in docs/_build, from nothing. GALLERY=full runs the examples as long as their
# readers would; without it they are short. GALLERY=none does not run them.
docs: $(VENV)/.docs
	rm -rf $(SITE)
	$(VENV)/bin/python -m sphinx -W --keep-going --quiet \
		$(if $(filter none,$(GALLERY)),-D plot_gallery=0) docs docs/_build

# What is uploaded: sdist and wheel, each installed where there is nothing else, pass their
# doctests and run the code of the README.
release-check: $(VENV)/.dev
	rm -rf $(DIST)
	$(VENV)/bin/python -m build --outdir $(DIST)
	for package in $(DIST)/*.tar.gz $(DIST)/*.whl; do \
		rm -rf $(VENV)-empty && \
		$(PYTHON) -m venv --without-pip $(VENV)-empty && \
		$(PYTHON) -m pip --python $(VENV)-empty/bin/python install $$package && \
		$(VENV)-empty/bin/python -I .ci/installed.py || exit 1; \
	done
	rm -rf $(VENV)-empty

# pip of the Python at hand fills the environment, so that venv needs no pip of its own to copy:
# some systems ship one without the other.
$(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV)/bin/python install pip -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-empty $(DIST) $(SITE)
