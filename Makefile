# Every target works on a fresh clone with git, make and Python 3.11; none needs another one run before it.
#   make demo      data, training on two ranks, evaluation on classes never trained on
#   make test      the tests
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MEGACLASS_DATA ?= ../shared/data
RANKS ?= 2

export DS_BUILD_OPS := 0

.PHONY: help setup demo omniglot hanglyph test lint types wheel clean
help:
	@grep -E '^#   ' Makefile | sed 's/^#//'

# torch comes first and alone: anything else that is installed without it pulls gigabytes of CUDA packages.
$(VENV)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/package: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/everything: $(VENV)/package
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,ann,dali,deepspeed]'
	touch $@

#   make setup     .venv/ with everything in it
setup: $(VENV)/everything

demo: $(VENV)/package
	test -f data/glyphs/dataset.json || $(BIN)/megaclass data glyphs --out data/glyphs
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/demo.yaml

#   make omniglot  one-shot recognition of unseen alphabets (Omniglot, from MEGACLASS_DATA)
omniglot: $(VENV)/package
	test -f data/omniglot/dataset.json || $(BIN)/megaclass data images $(MEGACLASS_DATA)/omniglot/images_background.zip \
		--out data/omniglot --class-depth 2 --source-pattern '_(\d+)\.png$$' --unseen-groups last:5 --image-size 48 --quarter-turns
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/omniglot.yaml

#   make hanglyph  identification of unseen Han characters (from MEGACLASS_DATA)
hanglyph: $(VENV)/package
	test -f data/hanglyph/dataset.json || $(BIN)/megaclass data glyphs --strips $(MEGACLASS_DATA)/hanglyph/strips_dev.zip \
		--sources $(MEGACLASS_DATA)/hanglyph/faces.json --out data/hanglyph --unseen-classes 1000
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/hanglyph.yaml

test: $(VENV)/everything
	OMP_NUM_THREADS=1 $(BIN)/pytest

#   make lint      formatter, linter, docstrings
lint: $(VENV)/everything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

#   make types     type checker
types: $(VENV)/everything
	$(BIN)/mypy

#   make wheel     dist/*.whl
wheel: $(VENV)/everything
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) data runs dist
