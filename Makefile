PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: demo loop test slow clean

demo: $(VENV)/.installed  ## trains a LoRA with Diffusion-DPO, shows before and after, prints a win rate
	$(RUN) -m dpo_sd.train experiment=quickstart

LOOP := outputs/loop/$(shell date +%Y-%m-%d_%H-%M-%S)
loop: $(VENV)/.installed  ## style LoRA, pairs, simulated choices, DPO: the commands that a person runs by hand
	$(RUN) -m dpo_sd.train experiment=style_sft hydra.run.dir=$(LOOP)/style
	$(RUN) -m dpo_sd.generate loras=$(LOOP)/style prompts=shapes out=$(LOOP)/pairs
	$(RUN) -m dpo_sd.annotate pairs=$(LOOP)/pairs annotator=oracle judge.style=pastel
	$(RUN) -m dpo_sd.train experiment=style_dpo data.pairs=$(LOOP)/pairs lora.init_from=$(LOOP)/style \
		judge=oracle judge.preference=centred judge.style=pastel \
		callbacks.verdict.prompts=shapes:held_out hydra.run.dir=$(LOOP)/dpo

test: $(VENV)/.installed-dev  ## what CI runs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow"

slow: $(VENV)/.installed-dev  ## the larger twins of tests that make test runs small
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile -m slow

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "dpo_sd needs Python 3.11 to 3.13: make PYTHON=python3.11 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info
