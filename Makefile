# Every target works on a fresh clone with git, make and Python 3.11; none needs another one run before it.
#   make demo      data, training on two ranks, evaluation on classes never trained on
#   make test      the tests
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MEGACLASS_DATA ?= ../shared/data
RANKS ?= 2

export DS_BUILD_OPS := 0

.PHONY: help setup demo omniglot hanglyph test test-full test-nodes test-slurm test-docker lint types wheel clean \
	data-omniglot data-hanglyph data-hanglyph-all data-cjk study study-large study-head bench bench-data gpu
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
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,ann,dali,deepspeed,parquet,triton]'
	touch $@

#   make setup     .venv/ with everything in it
setup: $(VENV)/everything

demo: $(VENV)/package
	test -f data/glyphs/dataset.json || $(BIN)/megaclass data glyphs --out data/glyphs
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/demo.yaml

#   make omniglot  one-shot recognition of unseen alphabets (Omniglot, from MEGACLASS_DATA)
omniglot: data-omniglot
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/omniglot.yaml

#   make hanglyph  identification of unseen Han characters (from MEGACLASS_DATA)
hanglyph: data-hanglyph
	launch/torchrun.sh --nproc-per-node $(RANKS) -m megaclass train configs/hanglyph.yaml

data-omniglot: $(VENV)/package
	test -f data/omniglot/dataset.json || $(BIN)/megaclass data images $(MEGACLASS_DATA)/omniglot/images_background.zip \
		--out data/omniglot --class-depth 2 --source-pattern '_(\d+)\.png$$' --unseen-groups last:5 --image-size 48 --quarter-turns

STRIPS = --strips $(MEGACLASS_DATA)/hanglyph/strips_dev.zip --sources $(MEGACLASS_DATA)/hanglyph/faces.json
data-hanglyph: $(VENV)/package
	test -f data/hanglyph/dataset.json || $(BIN)/megaclass data glyphs $(STRIPS) --out data/hanglyph --unseen-classes 1000

data-hanglyph-all: $(VENV)/package
	test -f data/hanglyph-all/dataset.json || $(BIN)/megaclass data glyphs $(STRIPS) --out data/hanglyph-all --unseen-classes 0

#   make data-cjk  21,150 Han characters in twelve typefaces of Debian's, and 1,000 unseen ones (about 4 minutes)
FONTS := /usr/share/fonts
FACES = $(FONTS)/opentype/noto/NotoSansCJK-Regular.ttc\#2 $(FONTS)/opentype/noto/NotoSerifCJK-Regular.ttc\#2 \
	$(FONTS)/truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf $(FONTS)/truetype/droid/DroidSansFallbackFull.ttf \
	$(FONTS)/truetype/hanazono/HanaMinA.ttf $(FONTS)/truetype/cns11643/TW-Kai-98_1.ttf \
	$(FONTS)/truetype/cns11643/TW-Sung-98_1.ttf $(FONTS)/truetype/wqy/wqy-microhei.ttc\#0 \
	$(FONTS)/truetype/wqy/wqy-zenhei.ttc\#0 $(FONTS)/truetype/arphic/ukai.ttc\#0 \
	$(FONTS)/truetype/arphic/uming.ttc\#0 $(FONTS)/truetype/babelstone/BabelStoneHan.ttf
data-cjk: $(VENV)/package
	test -f data/cjk/dataset.json || test -f $(FONTS)/truetype/babelstone/BabelStoneHan.ttf || { echo "as root: apt-get install \
	fonts-noto-cjk fonts-lxgw-wenkai fonts-droid-fallback fonts-hanazono fonts-cns11643-kai fonts-cns11643-sung \
	fonts-wqy-microhei fonts-wqy-zenhei fonts-arphic-ukai fonts-arphic-uming fonts-babelstone-han"; exit 3; }
	test -f data/cjk/dataset.json || $(BIN)/megaclass data glyphs --fonts $(FACES) --characters han \
		--reserve hanglyph-v1:64 --min-faces 5 --min-images 4 --image-size 32 --unseen-classes 1000 --out data/cjk

#   make study     every study of docs/study/ but the two below, on Han glyphs and Omniglot (some hours)
STUDY = $(BIN)/megaclass study configs/study/$(1).yaml --out runs/study/$(1)
study: data-hanglyph data-hanglyph-all data-omniglot
	$(call STUDY,tuning)
	$(call STUDY,losses)
	$(call STUDY,rates)
	$(call STUDY,remedies)
	$(call STUDY,long)
	$(call STUDY,long-margin)
	$(call STUDY,omniglot)
	$(call STUDY,entanglement)
	$(call STUDY,heating)
	$(call STUDY,noise)
	$(call STUDY,endpoint)

#   make study-large   the rates again at 21,150 classes
study-large: data-cjk
	$(call STUDY,large)
	$(call STUDY,large-more)

#   make study-head    what the class layer costs at one million classes
study-head: $(VENV)/package
	$(call STUDY,million) --jobs 1

#   make bench     what the class layer costs, 500,000 classes; PEER=.../recognition/arcface_torch compares with Partial-FC
PEER ?=
bench: $(VENV)/package
	$(BIN)/megaclass bench head --num-classes 500000 --nproc 2 --sampling-rate 0.01 0.1 1 $(if $(PEER),--peer $(PEER))
	$(BIN)/megaclass bench head --num-classes 500000 --nproc 2 --sampling-rate 0.01 0.1 --row-update fused $(if $(PEER),--peer $(PEER))
	$(BIN)/megaclass bench scaling --nproc 2 --row-dtype bfloat16 --preset d-softmax-k --row-update fused
	$(BIN)/megaclass bench sampler

#   make bench-data the readers on 20,000 made-up photographs, on two ranks, and then on one with workers and its memory
bench-data: $(VENV)/everything
	test -f data/textures/dataset.json || { $(BIN)/python -m tests.support.textures data/textures-files && \
		$(BIN)/megaclass data images data/textures-files --out data/textures; }
	OMP_NUM_THREADS=1 $(BIN)/megaclass bench data configs/bench-data.yaml --nproc 2 --workers 0 --repeats 9
	OMP_NUM_THREADS=1 $(BIN)/megaclass bench data configs/bench-data.yaml --workers 0 2 --memory-samples 600000 --dataset.workers 2

#   make gpu       on a machine with a GPU: its checks, then figures into docs/gpu; PEER as for bench
GPU_PYTHON ?= $(BIN)/python
GPU_HEAD = $(GPU_PYTHON) -m megaclass bench head --batch-size 4096 --row-dtype bfloat16 --optimizer adagrad --row-update fused
PEER_CLASSES ?= 5000000
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/everything)
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no CUDA device here")'
	$(GPU_PYTHON) -m pytest -m gpu
	$(GPU_PYTHON) -m pytest tests/unit/test_triton.py
	{ $(GPU_PYTHON) -c 'import datetime, torch; print(torch.cuda.get_device_name(), torch.__version__, datetime.date.today())'; \
	$(if $(PEER),$(GPU_PYTHON) -m megaclass bench head --batch-size 4096 --num-classes $(PEER_CLASSES) --sampling-rate 0.1 \
		0.015625 --preset partial-fc --peer $(PEER) --json docs/gpu/peer.json;) \
	$(GPU_HEAD) --num-classes 10000000 --preset d-softmax --kernel chunked --json docs/gpu/exact-chunked.json; \
	$(GPU_HEAD) --num-classes 10000000 --preset d-softmax --kernel triton --json docs/gpu/exact-triton.json; \
	$(GPU_HEAD) --num-classes 60000000 --preset d-softmax-k --sampling-rate 0.015625 --json docs/gpu/sampled.json; \
	} | tee docs/gpu/RESULTS.txt

# Tests that start several ranks run one after the other, the rest two at a time. Both parts run, whatever fails.
ELSEWHERE := not full and not nodes and not slurm and not docker
test: $(VENV)/everything
	failed=0; export OMP_NUM_THREADS=1; \
	$(BIN)/pytest -n 2 --dist loadfile -m "not distributed and $(ELSEWHERE)" || failed=1; \
	$(BIN)/pytest -m "distributed and $(ELSEWHERE)" || failed=1; \
	exit $$failed

#   make test-full the whole grid of the oracle test: every loss x sampler x kernel x world size x odd size; a million
#                  samples at every world size; five thousand damaged data sets
test-full: $(VENV)/everything
	OMP_NUM_THREADS=1 $(BIN)/pytest -m full

#   make test-nodes  as root: two nodes in network namespaces, lost, signalled and with wrong interfaces (about 5 minutes)
test-nodes: $(VENV)/everything
	OMP_NUM_THREADS=1 $(BIN)/pytest -m nodes -rP tests/system/test_two_nodes.py

#   make test-slurm  as root on Debian: installs Slurm, starts one of two nodes in a folder, trains, preempts, loses a node
test-slurm: $(VENV)/everything
	tests/system/slurm/setup.sh install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm -rP tests/system/slurm

#   make test-docker  the container files for real: both images built on a stand-in for their bases and run, Prometheus on
#                  a live run, every panel and rule; installs Debian packages, as root (10 to 30 minutes, 10 GB meanwhile)
test-docker: $(VENV)/everything
	tests/docker/setup.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' --durations 10 tests/docker tests/system/test_docker_files.py

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
