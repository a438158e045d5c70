# `make help` lists what there is. The environment, .venv, is built once, with python3 (or PYTHON=...) >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NB ?=
SUITE ?= core
STUDY ?= full

.DEFAULT_GOAL := help
.PHONY: help demo test lab notebooks readme docs bench study clean

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1 - /p' Makefile

demo: $(READY) ## check the equivalences and train four small models on handwritten digits
	@$(BIN)/vdc_demo

test: $(READY) ## check that everything generated is up to date, then run every test
	@echo "1/5 notebooks clean"
	@$(BIN)/python .ci/notebooks.py check clean
	@echo "2/5 package exported from the notebooks"
	@$(BIN)/python .ci/notebooks.py check export
	@echo "3/5 README made from the index"
	@$(BIN)/python .ci/notebooks.py check readme
	@echo "4/5 notebooks run"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	@echo "5/5 tests"
	@$(BIN)/python -m pytest -q tests

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

notebooks: $(READY) ## run every notebook in place and store the outputs (one thread: sums of the same order, the same digits); NB="nbs/a.ipynb ..." for some
	@OMP_NUM_THREADS=1 $(BIN)/python .ci/notebooks.py run $(NB)

readme: $(READY) ## make README.md from nbs/index.ipynb
	@$(BIN)/python .ci/notebooks.py readme

docs: $(READY) ## build the site into _docs/
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, which is not a Python package: get version 1.7 from" \
	  "https://quarto.org/docs/download/ and put 'quarto' on the PATH" >&2; exit 1; }
	@$(BIN)/python .ci/notebooks.py readme  # newer than the index, so that nbdev leaves it alone
	@$(BIN)/nbdev_docs

bench: $(READY) ## time our models and evaluations against timm's; SUITE=core, model, training or data
	@$(BIN)/vdc_bench --suite $(SUITE)

study: $(READY) ## train every row of Table 2 at toy size, or go on with it (an hour or two); STUDY=quick for a taste
	@$(BIN)/vdc_study --plan $(STUDY) --out study-$(STUDY)

clean: ## remove what was built, the environment too
	rm -rf .venv build dist demo study-quick _proc _docs vitdynconv.egg-info .pytest_cache .hypothesis

$(READY): settings.ini setup.py constraints.txt .ci/venv
	@PYTHON="$(PYTHON)" bash .ci/venv
