# One target per task. The first one called makes .venv and installs requirements.txt; later ones install nothing.
# Flags go through ARGS: make q2 ARGS="-no_maxpool -seed 7"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# CPU=1, at the first make: PyTorch without CUDA, from the index that its documentation names.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
CPU_BUILDS = --index-url https://download.pytorch.org/whl/cpu $(shell grep -oE '^torch[a-z]*==[0-9.]+' requirements.txt)
.DEFAULT_GOAL := help

.PHONY: help demo transcribe q1 q2 q2-grid q3 lab test lint bench bench-gpu clean
.PHONY: q1-records q2-records q3-records q3-ablations q3-lj-text q3-real records weights figures readme report

help:           ## this list
	@awk -F ':.*## ' '/^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z0-9-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(if $(CPU),$(INSTALL) $(CPU_BUILDS))
	$(INSTALL) --requirement requirements.txt
	@touch $@

##@ What everyone uses

demo: $(READY)  ## classify a scan and transcribe a recording, both from examples/ (15 seconds)
	$(BIN)/python hw2-q2.py -predict examples/CNV-9374492-182.jpeg
	$(BIN)/python transcribe.py examples/LJ050-0270.wav

transcribe: $(READY)  ## recordings to text: make transcribe FILE=talk.mp3
	$(BIN)/python transcribe.py $(if $(FILE),"$(FILE)") $(ARGS)

q1: $(READY)    ## question 1: tables and a figure of attention in linear time (a minute)
	$(BIN)/python attention_approx.py -figures runs/q1 $(ARGS)

q2: $(READY)    ## question 2: train on OCTMNIST, or on phantoms where it cannot be had (4 minutes)
	$(BIN)/python hw2-q2.py $(ARGS)

q2-grid: $(READY)  ## question 2, whole: three rates, the choice, no max-pool, three seeds
	$(BIN)/python hw2-q2.py -grid -seeds 42 43 44 -jobs 2 $(ARGS)

q3: $(READY)    ## question 3: both decoders on a spoken corpus, or LJ Speech if in data/ (10 minutes)
	$(BIN)/python run_notebook.py $(ARGS)

lab: $(READY)   ## the notebook of question 3 in Jupyter
	$(BIN)/jupyter lab $(ARGS) hw2-q3.ipynb

test: lint      ## lint and all tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY) ## our code against the plain way (after `make q3 ARGS="-p data spoken"`)
	$(MAKE) --keep-going -j1 bench-q1 bench-q2 bench-q3

bench-gpu: $(READY)  ## all questions on one GPU: speed, memory, agreement with the CPU (6 minutes)
	$(BIN)/python benchmarks/bench_gpu.py $(ARGS)

bench-%: $(READY)
	$(BIN)/python benchmarks/bench_$*.py

clean:          ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__

##@ What makes the records under results/, and what is drawn and written from them

# Recorded runs: results/ holds their records. They resume, so that an interrupted `make` loses one epoch at most.
# The real scans are not part of the repository: REAL names an .npz of OCTMNIST's layout.
REAL ?= ../shared/data/oct/kermany_subset.npz
Q2 := $(BIN)/python hw2-q2.py
GRID := $(Q2) -grid -seeds 42 43 44 -jobs 2 -resume
SEEDS := seed42 seed43 seed44
# $(call needs,VARIABLE,example): what a variable names must be there before hours of work begin.
needs = @test -e $($(1)) || { echo "$($(1)) does not exist: say $(1)=$(2)"; exit 1; }

q1-records: $(READY)  ## question 1: every record
	$(BIN)/python benchmarks/bench_q1.py -curves -out results/q1.json
	$(BIN)/python benchmarks/bench_q1.py -out results/q1-bench.json

q2-records: $(READY)  ## question 2: every record (REAL=scans.npz)
	$(call needs,REAL,scans.npz)
	$(GRID) -data phantom -out results/q2/phantom-homework
	$(GRID) -data $(REAL) -out results/q2/real-subset-homework
	$(GRID) -data $(REAL) -epochs 100 -out results/q2/real-subset-homework-100-epochs
	$(GRID) -data $(REAL) -epochs 100 -recipe strong -out results/q2/real-subset-strong-100-epochs
	$(GRID) -data phantom -recipe strong -out results/q2/phantom-strong
	rm -f results/q2/phantom-to-real-*.json
	$(Q2) -evaluate -data $(REAL) -out results/q2/phantom-to-real-homework.json \
	    -checkpoint $(SEEDS:%=results/q2/phantom-homework/maxpool-lr0.01-%/best.pt)
	$(Q2) -evaluate -data $(REAL) -out results/q2/phantom-to-real-homework-lr0.1.json \
	    -checkpoint $(SEEDS:%=results/q2/phantom-homework/maxpool-lr0.1-%/best.pt)
	$(Q2) -evaluate -data $(REAL) -out results/q2/phantom-to-real-strong.json \
	    -checkpoint $(SEEDS:%=results/q2/phantom-strong/maxpool-lr0.003-%/best.pt)
	$(BIN)/python report/pooling.py -data phantom
	$(BIN)/python report/pooling.py -data $(REAL) -epochs 100
	$(BIN)/python benchmarks/bench_q2.py -out results/q2/bench.json

# LJ Speech, or a part of it, in its own layout; the texts of all its clips.
REAL_SPEECH ?= ../shared/data/LJSpeech-1.1
TEXTS ?= ../shared/data/ljspeech_transcripts.csv
TEST_SPEECH ?= ../shared/data/ljspeech-chapters
RECORDED := $(BIN)/python run_notebook.py -out runs/q3/recorded -p extra_clips 52 -p records_dir results/q3

q3-records: $(READY)  ## question 3: every record but the long ones (REAL_SPEECH=LJSpeech-1.1)
	$(call needs,REAL_SPEECH,path/to/LJSpeech-1.1)
	$(BIN)/python benchmarks/run_q3.py -records results/q3 -out results/q3/run.json  # with seed 42
	$(RECORDED) -p data spoken -p seed 43
	$(RECORDED) -p data spoken -p seed 44
	$(RECORDED) -p data spoken -p preset homework
	$(RECORDED) -p data $(REAL_SPEECH) -p memorise 32 -y '{overrides: {epochs: 120, warmup_steps: 50, local_kernel: null}}'
	$(BIN)/python benchmarks/bench_q3.py -data $(REAL_SPEECH) -out results/q3/bench.json \
	    -checkpoints runs/q3/spoken-seed0-improved-lstm-seed43-*/model.safetensors \
	    runs/q3/spoken-seed0-improved-transformer-seed43-*/model.safetensors
	$(BIN)/python report/transcripts.py

# One run of each, to compare with seed 42: what the parts of the preset `improved` are worth.
ABLATED := $(RECORDED) -p data spoken -y
q3-ablations: $(READY)  ## question 3: what single changes of the preset are worth (20 minutes; resumes)
	$(ABLATED) '{overrides: {ctc_weight: 0, guide_weight: 0}}'
	$(ABLATED) '{overrides: {local_kernel: null}}'
	$(BIN)/python report/transcripts.py

# What is to be tested on as real speech is read in no training: its texts, and three whole chapters. The networks are kept
# in half their size as well: q3-real starts from them, and `make weights` takes the better one.
q3-lj-text: $(READY)  ## question 3 on LJ Speech's texts, spoken: 2 hours; resumes (TEXTS=, TEST_SPEECH=)
	$(call needs,TEXTS,path/to/metadata.csv)
	$(call needs,TEST_SPEECH,path/to/folder)
	$(BIN)/python -m offline_data.speech -transcripts $(TEXTS) -out data/lj-text \
	    -unread LJ001 LJ002 LJ050 $(TEST_SPEECH)/metadata.csv
	$(RECORDED) -p data data/lj-text -p also_test $(TEST_SPEECH) \
	    -y '{overrides: {epochs: 10, attention_window: 1}}' $(ARGS)
	for d in lstm transformer; do rm -f data/q3-$$d.safetensors; $(BIN)/python transcribe.py \
	    -weights runs/q3/lj-text-improved-$$d-seed42-*/model.safetensors -export data/q3-$$d.safetensors || exit 1; done
	$(BIN)/python report/transcripts.py

# The networks of q3-lj-text adapted to a real voice, with fewer clips of it as well, and networks that know nothing else.
ON_REAL := -p also_test $(TEST_SPEECH) -p mixed_with data/lj-text -p pretrained 'data/q3-{decoder}.safetensors'
q3-real: $(READY)  ## question 3 on real speech, after q3-lj-text (an hour; resumes)
	$(call needs,REAL_SPEECH,path/to/LJSpeech-1.1)
	$(call needs,TEST_SPEECH,path/to/folder)
	$(call needs,TEXTS,path/to/metadata.csv)
	$(RECORDED) -p data $(REAL_SPEECH) $(ON_REAL)
	for n in 46 93; do mkdir -p data/first-$$n && head -n $$n $(REAL_SPEECH)/metadata.csv > data/first-$$n/metadata.csv && \
	    ln -sfn $(abspath $(REAL_SPEECH))/wavs data/first-$$n/wavs && \
	    $(RECORDED)/fewer -p decoders lstm -p data data/first-$$n $(ON_REAL) || exit 1; done
	$(RECORDED) -p data $(REAL_SPEECH) -p also_test $(TEST_SPEECH) \
	    -y '{overrides: {epochs: 60, dropout: 0.1, spec_augment: true, attention_window: 1}}'
	$(BIN)/python benchmarks/voices.py -texts $(TEXTS) -real $(REAL_SPEECH) -out results/q3/voices.json
	$(BIN)/python report/transcripts.py

# All of them, one after the other, for each measures time. What each takes on two cores stands in results/README.md.
# Stopped, it is called again: questions 2 and 3 go on where they were.
records: $(READY)  ## all of them, in order: hours; resumes (REAL=, REAL_SPEECH=, TEXTS=, ...)
	$(MAKE) q1-records
	$(MAKE) q2-records
	$(MAKE) q3-records
	$(MAKE) q3-ablations
	$(MAKE) q3-lj-text
	$(MAKE) q3-real

# The networks that -predict and transcribe.py use where none is named, of recorded runs. The first is trained again where
# its best.pt is gone; the second is what q3-lj-text left.
WEIGHTS := weights/q2-strong-phantoms.safetensors
STRONG := results/q2/phantom-strong/maxpool-lr0.003-seed42
weights: $(READY)  ## the trained networks in weights/, after q3-lj-text
	$(Q2) -data phantom -recipe strong -seed 42 -out $(STRONG) -resume
	rm -f $(WEIGHTS)
	$(Q2) -export $(WEIGHTS) -checkpoint $(STRONG)/best.pt
	cp data/q3-lstm.safetensors weights/

figures: $(READY)  ## the figures of README.md and of the report
	$(BIN)/python report/figures.py

readme: figures  ## README.md, its picture, and the tables of results/README.md
	$(BIN)/python report/readme.py

report: figures  ## the report's figures, and report/report.pdf
	$(BIN)/python report/report.py
