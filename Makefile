# make setup   a virtual environment in .venv with everything in it; TORCH=cpu takes torch's CPU build, gigabytes less
# make demo    both stages on 1,800 drawings, two ranks, and a sheet of what they paint: some 11 minutes
# make test    the whole test suite
# make lint    ruff and pyright
# make docs    the documentation site in build/docs; a warning, such as a link that leads nowhere, is an error
# make faults  random kills, N=50 of them, and what they found in runs/faults/report.md or $(REPORT)
# make faults-storage  N=200 runs on HTTP and S3 servers that fail at random, report likewise
# make test-gpu    the tests that need a GPU, with the torch, Triton and pytest of $(PYTHON); the trainer's where it has more
# make bench-gpu   times of the kernels on this machine's GPU, into $(OUT)
# make clean       deletes .venv and what was built; make clean-runs deletes runs/ and demo/: every run trained here

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# PyPI's torch for Linux brings CUDA. The CPU build is on PyTorch's own index, as version X+cpu, which pip takes for newer than X.
TORCH ?= cuda
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup demo test lint docs faults faults-storage test-gpu bench-gpu gpu-package clean clean-runs

setup: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(INDEX) -c constraints.txt -e ".[test,lint,docs]"
	@touch $@

demo: $(READY)
	$(BIN)/bifrost data demo demo
	$(BIN)/bifrost train recipes/tiny-mllm.yaml --ranks 2
	$(BIN)/bifrost train recipes/tiny-controlnet.yaml --ranks 2
	$(BIN)/bifrost eval --mllm runs/tiny-mllm --controlnet runs/tiny-controlnet --data 'demo/train-*.tar' \
	  --heldout 'demo/heldout-*.tar' --flux-steps 8 --conditioning-scale 1 --out runs/demo

# Tests wait a third of their time, for processes and for a cluster: one pytest worker more than a laptop's two cores.
test: $(READY)
	$(BIN)/pytest -n 3 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(READY)
	rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going -d build/doctrees docs build/docs

# What was interrupted goes on in the same FOLDER.
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

# On a GPU machine the torch that fits its driver is there already: the package goes beside it, into a folder of its
# own, without its dependencies and without a network. pip builds it with the setuptools (77 or later) of $(PYTHON).
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
