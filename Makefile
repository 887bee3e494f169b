# The commands of a checkout; each installs what it needs first, once.

VENV := .venv
STAMP := $(VENV)/.installed
# Two tests at a time: while one waits for a process, another works.
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2

.PHONY: demo test test-long lint install lock clean

# The demonstration: SFT, reward model and PPO on a task made from a seed; results in runs/demo.
demo: $(STAMP)
	$(VENV)/bin/rlhf-ray demo

# Lint and tests; PYTEST_ARGS="-k packing" runs some.
test: SELECTED := -m "not long"
test-long: SELECTED :=
test test-long: lint
	$(VENV)/bin/pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(SELECTED) $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(STAMP)

$(STAMP): pyproject.toml requirements/cpu.txt scripts/install.sh scripts/sources.sh
	./scripts/install.sh

# Chooses the newest versions that pyproject.toml allows.
lock: $(STAMP)
	./scripts/lock.sh

# Removes the environment and caches, and leaves runs/ alone.
clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
