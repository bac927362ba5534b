# make demo   a tiny model learns in about a minute, golden answers beside what it says
# make test   every test, on two cores in under 15 minutes
# make quick  the fast tests        make check  format, lint, types
# make trust  the numeric checks        make mutants  that each check kills its mutant
# make fuzz   500 drawn requests to every route of a real server
# make bench  the benchmarks that need no data of yours
# make screenshots  the pictures in docs/img, from a demo run (needs chromium)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick trust mutants fuzz check format docs bench screenshots clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes, most of it PyTorch) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/trainer demo

# Tests compute in one thread each, so that two files at a time use two cores.
TWO := -n 2 --dist loadfile

test: $(STAMP)
	$(BIN)/python -m pytest $(TWO)

quick: $(STAMP)
	$(BIN)/python -m pytest $(TWO) -m "not slow"

trust: $(STAMP)
	$(BIN)/python -m pytest $(TWO) tests/trust

mutants: $(STAMP)
	$(BIN)/python -m pytest -q $(TWO) -k is_killed

fuzz: $(STAMP)
	FUZZ_EXAMPLES=500 $(BIN)/python -m pytest -s tests/integration/test_server_fuzz.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python -m trainer.config.render

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_startup.py
	$(BIN)/python benchmarks/bench_monitor.py

screenshots: $(STAMP)
	$(BIN)/python benchmarks/screenshots.py

clean:
	rm -rf $(VENV) demo_run build dist *.egg-info
