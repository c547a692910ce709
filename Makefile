# Each target is one line over the command `hafs`; ARGS is passed to it. `make help` explains the variables.
PYTHON  ?= python3
VENV    ?= .venv
ACCEL   ?= auto
PROFILE ?= auto
VARIANT ?= baseline
ARCH    ?= batchtopk
SEED    ?= 0
OUT     ?= artifacts
GRID    ?= seed=0..3
WORLD   ?= toy-0
EXPERIMENT ?= experiments/reduced.toml
ENGINE  ?= local
ARGS    ?=

PY     := $(VENV)/bin/python
HAFS   := $(VENV)/bin/hafs
PLACE   = --out $(OUT) --profile $(PROFILE)
DEMO    = --out $(OUT) --profile offline
comma  := ,

# ACCEL=auto keeps what $(VENV) was set up for, and asks the driver where it was not. Each choice has one CUDA stack: two
# would install to the same paths. So an environment that was set up for another is made anew, and so is one with CUDA
# whose constraints have changed.
STAMPS := $(wildcard $(VENV)/.set-up-*)
ifeq ($(ACCEL),auto)
CHOICE := $(if $(filter 1,$(words $(STAMPS))),$(STAMPS:$(VENV)/.set-up-%=%),$(shell $(PYTHON) constraints/accelerator.py 2>/dev/null))
else
CHOICE := $(ACCEL)
endif
ifeq ($(filter cpu cuda12 cuda13,$(CHOICE)),)
$(error ACCEL=$(ACCEL) is unknown: take auto, cpu, cuda12 or cuda13)
endif
STAMP  := $(VENV)/.set-up-$(CHOICE)
CLEAR  := $(if $(filter-out $(VENV)/.set-up-cpu,$(STAMPS) $(and $(STAMPS),$(STAMP))),--clear)
EXTRAS := extract,evaluate,explore,dev,docs$(if $(filter-out cpu,$(CHOICE)),$(comma)$(CHOICE))
PIP     = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints/$(CHOICE).txt

# On busy cores OpenMP threads that spin while they wait cost more than they save.
export OMP_WAIT_POLICY ?= PASSIVE

# What there is of $(1), with its size, is removed once someone has agreed. Nobody can where there is no terminal.
define remove
found=$$(ls -d $(1) 2>/dev/null); test -n "$$found" || { echo "nothing to remove: no $(1)"; exit 0; }; \
du -sh $$found; \
if test "$(CONFIRM)" = yes; then answer=y; \
elif test -t 0; then printf 'remove this? [y/N] '; read answer; \
else echo "nothing is removed: there is no terminal to ask at; give CONFIRM=yes" >&2; exit 2; fi; \
case $$answer in y|Y|yes) rm -rf $$found;; *) echo "nothing is removed";; esac
endef

.PHONY: help setup constraints demo test gpu-check lint docs extract train sweep synth eval experiment report explore bench bench-quick clean
.PHONY: distclean torture

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s%s\n", $$1, $$2}'
	@echo "Variables, with their defaults in brackets:"
	@echo "  PROFILE     What to extract: pythia70m needs the model hub, offline and wide (more text) do not, auto takes what can"
	@echo "              be had; later targets take the profile that was extracted last. [auto]"
	@echo "  VARIANT     The arm: baseline, strict, adaptive, yielding, ramp_only, gate_only, ortsae, frob,"
	@echo "              random_init or frozen_decoder. [baseline]"
	@echo "  ARCH        The architecture: batchtopk, topk, hierarchical_topk, relu, jumprelu, gated, matryoshka or"
	@echo "              matryoshka_relu. [batchtopk]"
	@echo "  SEED        The seed of weights and data order. [0]"
	@echo "  MESH        How devices share a step: data=2,latent=4. [all devices split the batch]"
	@echo "  OUT         The folder of stores, runs and reports. [artifacts]"
	@echo "  GRID        The SAEs of a sweep, such as GRID='variant=baseline,adaptive k=20,40'. [seed=0..3]"
	@echo "  WORLD       The synthetic world of make synth. [toy-0]"
	@echo "  EXPERIMENT  The file of make experiment. [experiments/reduced.toml]"
	@echo "  ACCEL       What make setup installs JAX and torch for: cpu, cuda12, cuda13, or auto, which asks the NVIDIA driver. [auto]"
	@echo "  CONFIRM     yes: make clean and make distclean remove without asking. [ask]"
	@echo "  ENGINE      What runs the model of make extract: local, or ray (pip install 'hafs-jax[extract-ray]'). [local]"
	@echo "  WORKERS     How many processes run it. [local: 1; ray: one for each GPU, or machine]"
	@echo "  STREAM      For make train: flags of hafs extract, which then runs beside it, such as STREAM='--window-gb 50'. [none]"
	@echo "  ARGS        Flags for the command behind a target; make train ARGS=--help lists them. [none]"

setup: $(STAMP)  ## create the environment in .venv; does nothing when up to date

$(STAMP): pyproject.toml constraints/$(CHOICE).txt constraints/without-dependencies.txt
ifeq ($(ACCEL)$(STAMPS),auto)
	@$(PYTHON) constraints/accelerator.py >/dev/null
endif
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(PIP) torch
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps -r constraints/without-dependencies.txt
	@touch $@

constraints:  ## write constraints/*.txt for all accelerators and Pythons (ARGS=--upgrade: the newest versions)
	for accel in cpu cuda12 cuda13; do $(PY) -m uv pip compile pyproject.toml --extra extract --extra evaluate --extra explore --extra dev --extra docs \
	  $$(test $$accel = cpu || echo --extra $$accel) --universal --no-annotate --quiet -o constraints/$$accel.txt $(ARGS) \
	  --custom-compile-command "make constraints" || exit; done

demo: setup  ## the whole pipeline, offline: a packaged model and text, four SAEs, evaluation, report
	$(HAFS) extract $(DEMO)
	$(HAFS) train $(DEMO) --variant baseline
	$(HAFS) train $(DEMO) --variant strict
	$(HAFS) train $(DEMO) --variant adaptive
	$(HAFS) train $(DEMO) --variant baseline --arch relu
	$(HAFS) evaluate $(DEMO)
	$(HAFS) report $(DEMO)

test: setup  ## all tests, on the CPU and without a model hub
	JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

gpu-check: setup  ## every step compiled for GPUs without one, against limits (needs the extra gpu-check, 5.6 GB)
	JAX_PLATFORMS=cpu $(PY) -m benchmarks.schedules $(ARGS)

torture: setup  ## kills, signals, failing disks and power losses at hundreds of places (ARGS=--help)
	JAX_PLATFORMS=cpu $(PY) -m tests.torture $(ARGS)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

docs: setup  ## this documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build $(ARGS)

extract: setup  ## text -> activation store (ENGINE, WORKERS)
	$(HAFS) extract $(PLACE) --engine $(ENGINE) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

train: setup  ## activation store -> SAE (VARIANT, ARCH, SEED, MESH)
	$(HAFS) train $(PLACE) --variant $(VARIANT) --arch $(ARCH) --seed $(SEED) $(if $(STREAM),--stream "$(STREAM)") $(if $(MESH),--mesh $(MESH)) $(ARGS)

sweep: setup  ## activation store -> many SAEs over one pass of the data (GRID)
	$(HAFS) sweep $(PLACE) --grid "$(GRID)" $(ARGS)

synth: setup  ## ground truth: a synthetic world, SAEs on it, their scores (WORLD, GRID)
	$(HAFS) synth --out $(OUT) --world $(WORLD) $(if $(filter file,$(origin GRID)),,--grid "$(GRID)") $(ARGS)

eval: setup  ## SAEs -> SAELens folders and evaluations
	$(HAFS) evaluate $(PLACE) $(ARGS)

experiment: setup  ## arms x architectures x L0 x seeds, compared with uncertainty (EXPERIMENT=experiments/reduced.toml)
	$(HAFS) experiment $(EXPERIMENT) --out $(OUT) $(ARGS)

report: setup  ## evaluations -> report/index.html, report.md, results.json
	$(HAFS) report $(PLACE) $(ARGS)

explore: setup  ## a page to type texts into: latents, search, steering (127.0.0.1 only)
	$(HAFS) explore $(PLACE) $(ARGS)

bench: setup  ## all benchmarks: against other libraries and the machine's limits (benchmarks/README.md)
	$(PY) -m benchmarks $(ARGS)

bench-quick: setup  ## a few of them at fewer sizes, in minutes, into $(OUT)/bench.json
	$(PY) -m benchmarks --quick --write $(OUT)/bench.json $(ARGS)

clean:  ## remove $(OUT): stores, runs, evaluations, reports; asks first (without a terminal: CONFIRM=yes)
	@$(call remove,$(OUT))

distclean:  ## remove $(OUT) and the environment $(VENV); asks first (without a terminal: CONFIRM=yes)
	@$(call remove,$(OUT) $(VENV))
