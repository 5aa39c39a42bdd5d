# make run | test | lab | clean | help. The first of them sets up .venv; nothing else on the machine is touched.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install
TORCH := torch==2.13.0
PAPERS ?=
PRESET ?= quick
ARGS ?=
# torch's threads must yield while they wait: two busy processes on two cores are five times slower otherwise
export OMP_WAIT_POLICY ?= PASSIVE

# the stamp's name holds what the set-up depends on: a changed pin, or a moved folder, is set up again
STAMP := $(VENV)/.installed-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)

.PHONY: run test lab clean help
help:
	@echo "make run [PAPERS='linfusion ...'] [PRESET=quick|desk|full] [ARGS='-p steps=50']   run papers, judge, report"
	@echo "make test    linters, types, unit tests, the notebooks under nbval, the browser tests"
	@echo "make lab     JupyterLab at notebooks/00_start_here.ipynb"
	@echo "make clean   remove .venv and caches; outputs/ stays"
	@echo "Set up with another Python: make PYTHON=/path/to/python3 run"

run: $(STAMP)
	@$(BIN)/workbench run $(PAPERS) --preset $(PRESET) $(ARGS)

lab: $(STAMP)
	@# the checkout is the root, or links to outputs/ would lead nowhere
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

# one thread a process: two notebooks at a time share two cores
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "unit tests"; $(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser" tests
	@# the browser opens the runs that nbval made, so that nothing is trained twice
	@echo "notebooks under nbval"; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; WORKBENCH_OUT="$$out" \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --durations=5 notebooks; \
	  echo "browser tests"; WORKBENCH_BROWSER_RUNS="$$out/runs" $(BIN)/python -m pytest -m browser -rs tests

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find workbench kernels tests tools -name __pycache__ -prune -exec rm -rf {} +

$(STAMP):
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python="$(PYTHON)"; \
	  for p in python3.11 python3.12 python3.13 python3 python3.14; do \
	    [ -n "$$python" ] && break; \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && python=$$p; \
	  done; \
	  [ -n "$$python" ] || { echo "error: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3 run" >&2; exit 2; }; \
	  echo "setting up $(VENV) with $$($$python --version)"; \
	  $$python -m venv --clear $(VENV); \
	fi
	@echo "installing torch"
	@if [ "$$(uname)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then $(PIP) $(TORCH); \
	elif $(PIP) $(TORCH)+cpu 2>/dev/null; then :; \
	else $(PIP) $(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu; fi
	@echo "installing the rest: a few minutes the first time"
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) --no-build-isolation -c constraints.txt -e '.[lab,test]'
	@rm -f $(VENV)/.installed-* && touch $@
