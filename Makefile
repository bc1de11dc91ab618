# Two commands: `make demo` and `make test`. Each makes .venv through constraints.txt on its first run.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(RUN) -m clead demo

test: $(VENV)/.dev lint
	$(RUN) -m pytest

lint: $(VENV)/.dev
	$(RUN) -m ruff check src tests benchmarks
	$(RUN) -m ruff format --check src tests benchmarks
	$(RUN) -m ty check --python $(VENV) src

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clead needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

# Without its dependencies: torchattacks pins an old requests and wants torchvision, and imports neither.
$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(RUN) -m pip install --quiet --no-deps torchattacks==3.5.1
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
