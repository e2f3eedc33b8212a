# make                                this help
# make study [PLAN=smoke] [CORES=2]   run a plan: its table and figures
#                                     ANEW=1: train its published runs, too, which else count as done
#                                     GPUS=2 RUNS_PER_GPU=4: on how many GPUs (all), and how many runs share one (1)
#                                     PROFILE=profiles/slurm: on a cluster (docs/clusters.md)
# make test                           ruff and pytest, without what takes minutes
# make test-slow                      that too: several processes, kills, workflows, and every notebook against its committed outputs
# make test-oldest                    the fast tests with the oldest torch, torchvision and timm that pyproject.toml allows (7 GB)
# make lab                            open the notebooks in JupyterLab
# make publish PLAN=...               pack a finished plan, its tables and figures into results/published/; PARTIAL=1: what is finished
#                                     so far; MIXED=1: runs of several commits, too
# make benchmark NAME=hdkd_step       time a step, or reading data (tests/benchmarks)
# make bench DEVICE=cuda              what a GPU makes of every method, beside published numbers (tests/benchmarks/gpu.py)
# make readme                         write README's numbers anew from results/
# make notebooks                      execute every notebook at its defaults, in place
# make site                           the website: docs/_build/html; CHECK=1: only if the outputs of all notebooks are up to date
PYTHON ?= python3
PLAN ?= smoke
DEVICE ?= auto
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
.PHONY: help study dry-run test test-slow test-oldest lab publish benchmark bench readme notebooks site lock
ifeq ($(shell uname),Linux) # glibc gives large blocks back to the system and page faults get them again: most of a CPU step
study publish lab benchmark bench: export MALLOC_MMAP_MAX_ = 0
study publish lab benchmark bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184
endif

help:
	@sed -n '/^[^#]/q; s/^# //p' Makefile

study dry-run: WHERE = --cores $(CORES) $(if $(PROFILE),--profile $(PROFILE)) $(if $(GPUS),--gpus $(GPUS)) \
  $(if $(RUNS_PER_GPU),--runs-per-gpu $(RUNS_PER_GPU))
study: .venv/installed
	@$(BIN)/python study.py run $(PLAN) $(if $(ANEW),--anew) $(WHERE)

dry-run: .venv/installed
	@$(BIN)/python study.py run $(PLAN) --dry-run $(WHERE)

publish: .venv/installed
	@$(BIN)/python study.py publish $(PLAN) $(if $(PARTIAL),--partial) $(if $(MIXED),--mixed)

benchmark: .venv/installed
	$(BIN)/python tests/benchmarks/$(NAME).py $(ARGUMENTS)

bench: .venv/installed
	$(BIN)/python tests/benchmarks/gpu.py --device $(DEVICE) $(ARGUMENTS)

benchmark bench: export PYTHONPATH = $(CURDIR)
lab: .venv/installed
	$(BIN)/jupyter lab --config=jupyter_lab_config.py

test test-slow: export TQDM_DISABLE = 1
test test-slow: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" tests

test-slow: test
	$(BIN)/pytest -n 2 --dist loadfile -m slow tests
	$(BIN)/pytest -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with tests/nbval.cfg notebooks

test-oldest:
	PYTHON=$(PYTHON) CORES=$(CORES) tests/oldest.sh $(ARGUMENTS)

readme: .venv/installed
	@$(BIN)/python study.py readme

notebooks: export TQDM_DISABLE = 1
notebooks: export OMP_NUM_THREADS = 1
notebooks: .venv/installed
	for notebook in notebooks/*.ipynb; do $(BIN)/papermill $$notebook $$notebook -k python3 || exit 1; done
	$(BIN)/nbstripout --keep-output --keep-count --keep-id \
	  --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info" notebooks/*.ipynb
	$(BIN)/python docs/outputs.py stamp notebooks/*.ipynb

site: export PYTHONPATH = $(CURDIR)
site: export TQDM_DISABLE = 1
site: .venv/docs
	$(if $(CHECK),$(BIN)/python docs/outputs.py check notebooks/*.ipynb)
	$(BIN)/python docs/pages.py docs/_build/source
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d docs/_build/doctrees docs/_build/source docs/_build/html

lock: .venv/installed
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header \
	  --no-emit-index-url -q -o constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make study PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q -c constraints.txt -e ".[study,slurm,weights,export,test]"
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/uv pip install -q -c constraints.txt -e ".[docs]"
	@touch $@
