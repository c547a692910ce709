# One line per target over `python -m extract`, `python -m hafs_jax`, `python -m evaluate`; ARGS is passed through.
PYTHON  ?= python3
VENV    ?= .venv
ACCEL   ?= cpu
PROFILE ?= auto
VARIANT ?= baseline
ARCH    ?= batchtopk
SEED    ?= 0
OUT     ?= artifacts
ARGS    ?=

PY     := $(VENV)/bin/python
PLACE   = --out $(OUT) --profile $(PROFILE)
DEMO    = --out $(OUT) --profile offline
STAMP  := $(VENV)/.set-up-$(ACCEL)
EXTRAS  = extract,evaluate,dev$(if $(filter-out cpu,$(ACCEL)),$(comma)$(ACCEL))
comma  := ,

# `evaluate` and `extract` are also names of other packages: the repository's own come first.
export PYTHONPATH := $(CURDIR)
# On busy cores OpenMP threads that spin while they wait cost more than they save.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test lint extract train eval report clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "Variables: PROFILE=auto|offline|pythia70m VARIANT=baseline|strict|adaptive ARCH=batchtopk|topk|relu SEED=0 OUT=artifacts"
	@echo "           ACCEL=cpu|cuda12|cuda13 ARGS='flags passed to the stage' (make train ARGS=--help lists them)"

setup: $(STAMP)  ## create the environment in .venv (ACCEL=cuda12 or cuda13 for a GPU); does nothing when up to date

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps sae-bench sae-probes
	@touch $@

demo: setup  ## the whole pipeline, offline: a packaged model and text, four SAEs, evaluation, report
	$(PY) -m extract $(DEMO)
	$(PY) -m hafs_jax train $(DEMO) --variant baseline
	$(PY) -m hafs_jax train $(DEMO) --variant strict
	$(PY) -m hafs_jax train $(DEMO) --variant adaptive
	$(PY) -m hafs_jax train $(DEMO) --variant baseline --arch relu
	$(PY) -m evaluate run $(DEMO)
	$(PY) -m evaluate report $(DEMO)

test: setup  ## all tests, on the CPU and without a model hub
	$(PY) -m pytest -n 2 $(ARGS)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

extract: setup  ## text -> activation store
	$(PY) -m extract $(PLACE) $(ARGS)

train: setup  ## activation store -> SAE (VARIANT, ARCH, SEED)
	$(PY) -m hafs_jax train $(PLACE) --variant $(VARIANT) --arch $(ARCH) --seed $(SEED) $(ARGS)

eval: setup  ## SAEs -> SAELens folders and evaluations
	$(PY) -m evaluate run $(PLACE) $(ARGS)

report: setup  ## evaluations -> report/index.html, report.md, results.json
	$(PY) -m evaluate report $(PLACE) $(ARGS)

clean:  ## remove $(OUT) and the environment
	rm -rf $(OUT) $(VENV)
