# make demo     install into .venv and train the tiny model with DAPO on 4 CPU ranks
# make test     install and run the tests          make lint     ruff
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# where `torch` comes from if not from the default index: make demo TORCH_INDEX=URL
TORCH_INDEX ?=

.PHONY: demo test test-slow lint format controls bench clean

demo: $(INSTALLED)
	$(RUN)/dapo-megatron train recipes/tiny-arithmetic-cpu.yaml run.directory=runs/demo --overwrite

test: $(INSTALLED)
	$(RUN)/python -m pytest -q -m "not slow"

test-slow: $(INSTALLED)
	$(RUN)/python -m pytest -q -m slow

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(INSTALLED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# the demo's claim and its controls over three seeds: docs/tiny-task.md
controls: $(INSTALLED)
	$(RUN)/python tools/tiny_controls.py

# every loss kernel beside its floor: table, CSV and picture under kernels/benchmarks/results/
bench: $(INSTALLED)
	$(RUN)/python kernels/benchmarks/bench.py

$(INSTALLED): requirements/cpu-py311.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(RUN)/pip install -q --disable-pip-version-check torch==2.13.0 --index-url $(TORCH_INDEX))
	$(RUN)/pip install -q --disable-pip-version-check -r requirements/cpu-py311.txt
	$(RUN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
