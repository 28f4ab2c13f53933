# `make quickstart` trains, evaluates and recommends on a synthetic world (DATA=folder: on your data); `make test` runs the suite.
# Both install into .venv first, and again only when pyproject.toml has changed.
.POSIX:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: quickstart test lint types format clean

PYTHON = python3.11 python3.12 python3.13 python3
USABLE = import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check
PACKAGE = cda4rec_jax kernels tests experiments

quickstart: .venv/.installed
	.venv/bin/cda4rec quickstart $(if $(DATA),--data "$(DATA)")

test: .venv/.installed-test
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed-dev
	.venv/bin/ruff check $(PACKAGE)
	.venv/bin/ruff format --check $(PACKAGE)

types: .venv/.installed-dev
	.venv/bin/pyright --project pyproject.toml --pythonpath .venv/bin/python

format: .venv/.installed-dev
	.venv/bin/ruff check --fix-only --quiet $(PACKAGE)
	.venv/bin/ruff format $(PACKAGE)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	@rm -rf .venv; \
	for python in $(PYTHON); do \
	    if "$$python" -c "$(USABLE)" 2>/dev/null; then \
	        echo "Making .venv with $$python ($$("$$python" --version))"; \
	        "$$python" -m venv .venv && touch $@ && exit 0; \
	        exit 1; \
	    fi; \
	done; \
	echo "No usable Python found: cda4rec_jax needs Python 3.11 or newer with the venv module (on Debian and Ubuntu: python3-venv)." >&2; \
	echo "Tried: $(PYTHON). Name another with: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
	exit 1

.venv/.installed: .venv/.created pyproject.toml
	@echo "Installing cda4rec_jax into .venv; the first time takes a minute or two"
	@$(PIP) install --editable .
	@touch $@

.venv/.installed-test: .venv/.created pyproject.toml
	@echo "Installing cda4rec_jax and its test tools into .venv; the first time takes a minute or two"
	@$(PIP) install --editable ".[test]"
	@touch .venv/.installed $@

.venv/.installed-dev: .venv/.created pyproject.toml
	@echo "Installing cda4rec_jax and its developer tools into .venv; the first time takes a minute or two"
	@$(PIP) install --editable ".[dev]"
	@touch .venv/.installed .venv/.installed-test $@
