PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: demo test clean

demo: $(VENV)/.installed  ## trains a LoRA with Diffusion-DPO, shows before and after, prints a win rate
	$(RUN) -m dpo_sd.train experiment=quickstart

test: $(VENV)/.installed-dev  ## what CI runs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(RUN) -m pytest -q

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
