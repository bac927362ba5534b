# make demo   a tiny model learns in about a minute, golden answers beside what it says
# make test   every claim's tests, on two cores in under 15 minutes
#             (the first time it fetches a browser: `make browser`)
# make test-long  those and the exhaustive ones (marker `long`), in under an hour
# make quick  the fast tests        make check  format, lint, types
# make trust  the numeric checks        make mutants  that each check kills its mutant
# make fuzz   500 drawn requests to every route of a real server
# make wheel  the wheel, installed into an empty environment, runs the demo there
# make bench  the benchmarks that need no data of yours
# make gpu    on a machine with a GPU: tests, tokens/s and memory beside TRL, stalls; in ten minutes
# make gpu-wheels  fills a folder with the packages that such a machine may lack
# make screenshots  the pictures in docs/img, from a demo run (needs chromium)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-long quick browser trust mutants fuzz check format docs wheel bench gpu gpu-wheels screenshots clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes, most of it PyTorch) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/trainer demo

# Tests compute in one thread each; some wait, so that three files at a time fill two cores.
FILES := -n 3 --dist loadfile

# The browser of the page's tests: the system's, else Playwright's, else (as root) the system's package.
BROWSER := $(VENV)/.browser

$(BROWSER): $(STAMP)
	@if command -v chromium > /dev/null || command -v chromium-browser > /dev/null \
	  || $(BIN)/python -m playwright install chromium \
	  || { test "$$(id -u)" = 0 && apt-get update --quiet && apt-get install --yes --quiet chromium; }; then touch $@; \
	else echo "NO BROWSER: neither Playwright nor the system's packages have a Chromium; its tests are skipped" >&2; fi

browser: $(BROWSER)

test: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest $(FILES) -m "not long"

test-long: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest $(FILES)

quick: $(STAMP)
	$(BIN)/python -m pytest $(FILES) -m "not slow and not long"

trust: $(STAMP)
	$(BIN)/python -m pytest $(FILES) -m "not long" tests/trust

mutants: $(STAMP)
	$(BIN)/python -m pytest -q $(FILES) -k is_killed

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
	$(BIN)/python -m trainer.config.docs

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_startup.py
	$(BIN)/python benchmarks/bench_monitor.py

# Installs nothing and needs no registry; GPU_PYTHON has a torch that sees the GPU.
# GPU_FLAGS=--rehearse runs the same code on the CPU.
GPU_PYTHON ?= python3
GPU_FLAGS ?=

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_FLAGS)

# For the Python and the C library of that machine, on one with a registry; copy the folder after.
GPU_PYTHON_VERSION ?= 3.12
GPU_PLATFORM ?= manylinux_2_28_x86_64

gpu-wheels:
	$(PYTHON) benchmarks/gpu_wheels.py --python-version $(GPU_PYTHON_VERSION) --platform $(GPU_PLATFORM)

# A checkout has files that a wheel may lack: the demo runs where there is nothing else.
wheel: $(STAMP)
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	git archive HEAD | (mkdir "$$work/source" && tar -x -C "$$work/source"); \
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w "$$work" "$$work/source"; \
	$(PYTHON) -m venv "$$work/venv"; \
	"$$work/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "$$work"/*.whl; \
	rm -rf "$$work/source"; cd "$$work"; \
	env -u PYTHONPATH "$$work/venv/bin/trainer" demo --steps 40 --output demo_run; \
	test -s demo_run/final_model/model.safetensors; test -s demo_run/report.html; \
	echo "the wheel runs the demo in an empty environment"

screenshots: $(STAMP)
	$(BIN)/python benchmarks/screenshots.py

clean:
	rm -rf $(VENV) demo_run build dist *.egg-info
