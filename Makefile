# make setup   creates a virtual environment in .venv; TORCH=cpu installs torch's CPU build, gigabytes smaller
# make demo    trains both stages on 6,000 scenes, two ranks, and scores images of held-out ones: about 12 minutes
# make demo-seeds  the same for two more seeds, after make demo: 20 minutes
# make test    the whole test suite
# make test-phantom  every shipped recipe at its real size on a phantom GPU, against the plan: needs g++ and TORCH=cpu
# make lint    ruff, pyright and the words that this project does not use
# make docs    builds the documentation site in build/docs; warnings, such as broken links, are errors
# make faults  N=50 random kills, with a report in runs/faults/report.md or $(REPORT)
# make faults-storage  N=200 runs on HTTP and S3 servers that fail at random, with a report like that of faults
# make test-gpu    the tests that need a GPU, with the torch, Triton and pytest of $(PYTHON), and the trainer's if installed
# make bench-gpu   times the kernels on this machine's GPU; results in $(OUT)
# make clean       deletes .venv and build outputs; make clean-runs deletes runs/ and demo/: every run trained here

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# PyPI's torch for Linux includes CUDA. The CPU build is on PyTorch's own index, as version X+cpu, which pip ranks above X.
TORCH ?= cuda
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup demo demo-seeds test test-phantom lint docs faults faults-storage test-gpu bench-gpu gpu-package clean clean-runs

setup: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(INDEX) -c constraints.txt -e ".[test,lint,docs]"
	@touch $@

DEMO_STAGE_1 := $(BIN)/bifrost train recipes/tiny-mllm.yaml --ranks 2 'validation.shards=demo/heldout-*.tar' \
  validation.every=150 validation.samples=120
# One thread: a second one saves a tenth of the time on an idle machine, and doubles it on a busy one.
DEMO_EVAL := env OMP_NUM_THREADS=1 $(BIN)/bifrost eval --ranks 2 --data 'demo/train-*.tar' --heldout 'demo/heldout-*.tar' --scenes demo/KEY.json --samples 16 \
  --flux-steps 8 --conditioning-scale 1 --batch 32

demo: $(READY)
	$(BIN)/bifrost data demo demo
	$(BIN)/python examples/kill_at_step.py runs/tiny-mllm 340 $(DEMO_STAGE_1)
	$(DEMO_STAGE_1)
	$(BIN)/bifrost train recipes/tiny-controlnet.yaml --ranks 2
	$(DEMO_EVAL) --mllm runs/tiny-mllm --controlnet runs/tiny-controlnet --out runs/demo

demo-seeds: $(READY)
	for seed in 1 2; do \
	  $(BIN)/bifrost train recipes/tiny-mllm.yaml --ranks 2 name=tiny-mllm-$$seed seed=$$seed && \
	  $(BIN)/bifrost train recipes/tiny-controlnet.yaml --ranks 2 name=tiny-controlnet-$$seed seed=$$seed && \
	  $(DEMO_EVAL) --mllm runs/tiny-mllm-$$seed --controlnet runs/tiny-controlnet-$$seed --out runs/demo-$$seed || exit 1; \
	done

# Tests spend a third of their time waiting for processes and a cluster: one pytest worker more than a laptop's two cores.
test: $(READY)
	$(BIN)/pytest -n 3 --dist worksteal

test-phantom: $(READY)
	$(BIN)/pytest tests/phantom --real-size -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/words.py

docs: $(READY)
	rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going -d build/doctrees docs build/docs

# An interrupted campaign resumes in the same FOLDER.
N ?= 50
FOLDER ?= runs/faults
REPORT ?= $(FOLDER)/report.md
HARDWARE ?= this machine

faults: $(READY)
	PYTHONPATH="$(CURDIR)/tests/support" $(BIN)/python tests/faults/campaign.py --kills $(N) --folder $(FOLDER) \
	  --report $(REPORT) --hardware "$(HARDWARE)"

faults-storage: N = 200
faults-storage: FOLDER = runs/faults-storage
faults-storage: $(READY)
	PYTHONPATH="$(CURDIR)/tests/support" $(BIN)/python tests/faults/storage_campaign.py --runs $(N) --folder $(FOLDER) \
	  --report $(REPORT) --hardware "$(HARDWARE)"

# A GPU machine already has a torch that fits its driver: the package is installed to a separate folder, without
# dependencies and without network access. pip builds it with the setuptools (77 or later) of $(PYTHON).
OUT ?= docs/benchmarks/results
GPU_PACKAGE := $(CURDIR)/build/gpu
GPU_PYTHON = TRITON_INTERPRET=0 PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_PACKAGE)" $(PYTHON)

gpu-package:
	@rm -rf "$(GPU_PACKAGE)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target "$(GPU_PACKAGE)" .

test-gpu: gpu-package
	$(GPU_PYTHON) -m pytest tests/kernels/test_gpu*.py tests/trainer -m gpu

bench-gpu: gpu-package
	$(GPU_PYTHON) -m bifrost.kernels.bench --kernel all --csv "$(OUT)/bench.csv" --json "$(OUT)/bench.json" --plots "$(OUT)"

clean:
	rm -rf .venv build *.egg-info

clean-runs:
	rm -rf demo runs
