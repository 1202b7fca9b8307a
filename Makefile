# Commands of this repository; `make` alone lists them. Plain make and python3 >= 3.11 are all they need.
# Override on the command line:  make demo PYTHON=python3.12  PIP_ARGS="--extra-index-url ..."  VENV=/big/disk/venv
# Settings of the trainer travel the same way:  make demo MAX_WALLCLOCK_SECONDS=60

PYTHON ?= python3
VENV ?= .venv
LOG_DIR ?= logs
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
MAC_ARGS ?=
MINI_ARGS ?=
NAME := mine
SEEDS := 1337 42 2025
unexport NAME SEEDS
TRACK ?= 10min_16mb
GPUS ?=
RECORD_ARGS ?=
SUBMIT_ARGS ?=
PROMPT ?= Return the

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
MACHINE := $(shell uname -sm)
NOW := $(shell date +%Y%m%d-%H%M%S)
DROP_VENV := if [ -f '$(VENV)/pyvenv.cfg' ]; then rm -rf '$(VENV)'; fi
CPU_WHEELS := --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: help setup demo demo-mlx demo-torch mini record test lint bench gpu mac clean

help:
	@echo 'make demo        train a small model for three minutes: artifact, score, curve, sample (MLX on Apple silicon, else PyTorch)'
	@echo 'make demo-mlx    the same with train_gpt_mlx.py'
	@echo 'make demo-torch  the same with train_gpt.py'
	@echo 'make mini        the scale model of the challenge: 80,000 bytes of weights, 5e13 training FLOPs, no clock'
	@echo 'make record      NAME=mine SEEDS="1337 42 2025": a run a seed on all GPUs, then the checked record folder; goes on where it was stopped'
	@echo 'make test        all tests: both scripts are one model, artifacts, resume, everyday events, data, bad input'
	@echo 'make lint        ruff: mistakes, and the one format'
	@echo 'make bench       time a training step of both scripts, and of both attentions, on this machine'
	@echo 'make gpu         on one CUDA GPU, at most ten minutes a call: exactness, times of everything, a run stopped, resumed and exported'
	@echo 'make mac         on Apple silicon, some minutes: exactness on Metal, compilation, speed, a run stopped and resumed'
	@echo 'make setup       only install requirements.txt into $(VENV)'
	@echo 'make clean       remove $(VENV), the offline corpus and caches; runs in $(LOG_DIR)/ and downloaded data stay'

setup: $(STAMP)

# The stamp makes a second `make` quick; a changed requirements.txt installs again.
$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON): not found; install Python 3.11 or newer, or name it: make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: $(PYTHON): expected Python 3.11 or newer, found %d.%d; name another: make PYTHON=python3.12" % v[:2])'
	@[ ! -e '$(VENV)' ] || [ -f '$(VENV)/pyvenv.cfg' ] || { echo 'error: VENV: $(VENV) exists and is no virtual environment; name another: make VENV=...'; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(DROP_VENV); $(PYTHON) -m venv '$(VENV)' >/dev/null 2>&1; } || { $(DROP_VENV); \
	  echo 'error: $(PYTHON) -m venv $(VENV) failed; on Debian and Ubuntu: sudo apt install python3-venv'; exit 1; }
ifeq ($(PIP_ARGS),)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(PY) -c 'import torch' 2>/dev/null; then \
	  echo 'notice: no NVIDIA card found; make PIP_ARGS="$(CPU_WHEELS)" spares some GB of CUDA packages'; fi
endif
	@echo 'installing requirements.txt into $(VENV) (minutes the first time)'
	@$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) -r requirements.txt
	@touch $@

ifeq ($(MACHINE),Darwin arm64)
demo: demo-mlx
SCRIPT := train_gpt_mlx.py
else
demo: demo-torch
SCRIPT := train_gpt.py
endif

# $(1) script, $(2) run
define run_demo
	@$(PY) data/offline.py
	@$(PY) $(1) --preset=demo --log_dir='$(LOG_DIR)' --run_id=$(2)
	@echo '--- loss curve'
	@$(PY) records/curve.py '$(LOG_DIR)/$(2)'
	@echo '--- sample, from the artifact on disk'
	@$(PY) $(1) --preset=demo --mode=sample --artifact='$(LOG_DIR)/$(2)/model.int6.rgpt' --prompt='$(PROMPT)'
	@echo '--- done: everything lies in $(LOG_DIR)/$(2)'
endef

demo-torch: $(STAMP)
	$(call run_demo,train_gpt.py,demo_torch_$(NOW))

demo-mlx: $(STAMP)
	$(call run_demo,train_gpt_mlx.py,demo_mlx_$(NOW))

mini: $(STAMP)
	@[ -n '$(MINI_ARGS)' ] || [ -d data/datasets/mini_sp1024 ] || { echo 'error: data/datasets/mini_sp1024: not there; get it: $(PY) data/fineweb.py --train-shards 1 && $(PY) data/mini.py'; exit 1; }
	@echo 'a budget of FLOPs, not of minutes: `left:` in the step lines says how long it will take here'
	@$(PY) $(SCRIPT) --preset=mini --log_dir='$(LOG_DIR)' $(MINI_ARGS)

record: $(STAMP)
	@exec $(PY) records/record.py --name='$(NAME)' --track='$(TRACK)' --seeds $(SEEDS) $(if $(GPUS),--gpus=$(GPUS)) --log-dir='$(LOG_DIR)' \
	  --settings='$(RECORD_ARGS)' $(SUBMIT_ARGS)

test: $(STAMP)
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: $(STAMP)
	@$(PY) tests/bench.py $(BENCH_ARGS)

# A rented machine has its own torch, and perhaps no network: nothing is installed for this.
gpu:
	@$$([ -x '$(PY)' ] && echo '$(PY)' || echo '$(PYTHON)') tests/gpu.py $(GPU_ARGS)

mac: $(STAMP)
	@$(PY) tests/mac.py $(MAC_ARGS)

clean:
	$(DROP_VENV)
	rm -rf .pytest_cache .ruff_cache data/datasets/offline_sp* data/datasets/smoke_sp512
	rm -f data/tokenizers/offline_*_bpe.* data/tokenizers/smoke_512_bpe.*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
