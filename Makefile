# `make help` lists what there is. The environment, .venv, is built once, with python3 (or PYTHON=...) >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NB ?=
SUITE ?= core
STUDY ?= full
SLOW ?=

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lab notebooks readme docs bench study weights clean speed

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1 - /p' Makefile

demo: $(READY) ## check the equivalences and train four small models on handwritten digits
	@$(BIN)/vdc_demo

test: $(READY) ## check that everything generated is up to date, run every notebook and every test; SLOW=1 for the slow ones too
	@$(BIN)/python .ci/tests.py $(if $(SLOW),--slow)

gpu: $(READY) ## what only a GPU can show, in ten minutes: tests, kernels, benchmark, a short training; writes gpu/gpu.json and gpu/gpu.md
	@$(BIN)/python .ci/gpu.py gpu

speed: $(READY) ## measure every suite on a quiet machine, as it is and restricted to AVX2, into nbs/results/speed.csv (40 minutes)
	@bash .ci/speed

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

notebooks: $(READY) ## run every notebook in place, one per core at a time, and store the outputs (one thread each: sums of the same order, the same digits); NB="nbs/a.ipynb ..." for some
	@OMP_NUM_THREADS=1 $(BIN)/python .ci/notebooks.py run $(NB)

readme: $(READY) ## make README.md from nbs/index.ipynb
	@$(BIN)/python .ci/notebooks.py readme

docs: $(READY) ## build the site into _docs/
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, which is not a Python package: get version 1.10 or newer from" \
	  "https://quarto.org/docs/download/ and put 'quarto' on the PATH" >&2; exit 1; }
	@$(BIN)/python .ci/notebooks.py readme  # newer than the index, so that nbdev leaves it alone
	@$(BIN)/nbdev_docs

bench: $(READY) ## time our models and evaluations against timm's; SUITE=core, model, systems, scaling, training or data
	@$(BIN)/vdc_bench --suite $(SUITE)

study: $(READY) ## train the study on Fashion-MNIST, or go on with it (ten hours of two cores); STUDY=main, digits or quick for less
	@$(BIN)/vdc_study --plan $(STUDY) --out study-$(STUDY)

weights: $(READY) ## train the networks that come with the library, or go on with it, and put them into the package (an hour or two)
	@$(BIN)/vdc_study --weights --out study-weights
	@cp study-weights/*.safetensors vitdynconv/bundled/

clean: ## remove what was built, the environment too
	rm -rf .venv build dist demo gpu study-quick _proc _docs vitdynconv.egg-info .pytest_cache .hypothesis

$(READY): settings.ini setup.py constraints.txt .ci/venv
	@PYTHON="$(PYTHON)" bash .ci/venv
