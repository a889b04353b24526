# make setup   creates a virtual environment in .venv; TORCH=cpu installs torch's CPU build, gigabytes smaller
# make demo    trains both stages on 6,000 scenes, two ranks, and scores images of held-out ones: about 12 minutes
# make demo-seeds  the same for two more seeds, after make demo: 20 minutes
# make test    the test suite without its slow tests
# make test-all    the whole test suite, as CI runs it
# make test-phantom  every shipped recipe at its real size on a phantom GPU, against the plan: needs g++ and TORCH=cpu
# make lint    ruff, pyright and the words that this project does not use
# make docs    builds the documentation site in build/docs; warnings, such as broken links, are errors
# make faults  N=50 random kills, with a report in runs/faults/report.md or $(REPORT)
# make faults-mixture  the same in stage 2, on two sources in aspect-ratio buckets
# make faults-storage  N=200 runs on HTTP and S3 servers that fail at random, with a report like that of faults
# make faults-network  network faults between two nodes in namespaces, which need root, with a report like that of faults
# make test-gpu    the tests that need a GPU, with the torch, Triton and pytest of $(PYTHON), and the trainer's if installed
# make bench-gpu   times the kernels on this machine's GPU, for LIMIT=300 seconds; results in $(OUT)
# make device      all checks that need a GPU, in BUDGET=540 seconds; results in build/device
# make device-wheels  what make device needs on a machine that has torch, transformers and Triton, but no network
# make clean       deletes .venv and build outputs; make clean-runs deletes runs/ and demo/: every run trained here

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# PyPI's torch for Linux includes CUDA. The CPU build is on PyTorch's own index, as version X+cpu, which pip ranks above X.
TORCH ?= cuda
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup demo demo-seeds test test-all test-phantom lint docs faults faults-mixture faults-storage faults-network test-gpu \
  bench-gpu gpu-package device device-wheels clean clean-runs

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
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow"

test-all: $(READY)
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

faults-mixture: FOLDER = runs/faults-mixture
faults-mixture: $(READY)
	PYTHONPATH="$(CURDIR)/tests/support" $(BIN)/python tests/faults/campaign.py --mixture --kills $(N) \
	  --folder $(FOLDER) --report $(REPORT) --hardware "$(HARDWARE)"

faults-storage: N = 200
faults-storage: FOLDER = runs/faults-storage
faults-storage: $(READY)
	PYTHONPATH="$(CURDIR)/tests/support" $(BIN)/python tests/faults/storage_campaign.py --runs $(N) --folder $(FOLDER) \
	  --report $(REPORT) --hardware "$(HARDWARE)"

faults-network: FOLDER = runs/faults-network
faults-network: $(READY)
	PYTHONPATH="$(CURDIR)/tests/support" $(BIN)/python tests/faults/network_campaign.py --folder $(FOLDER) \
	  --report $(REPORT) --hardware "$(HARDWARE)"

# A GPU machine already has a torch that fits its driver: the package is installed to a separate folder, without
# dependencies and without network access. pip builds it with the setuptools (77 or later) of $(PYTHON).
OUT ?= docs/benchmarks/results
GPU_PACKAGE := $(CURDIR)/build/gpu
GPU_PYTHON = TRITON_INTERPRET=0 PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_PACKAGE)" $(PYTHON)

gpu-package:
	@rm -rf "$(GPU_PACKAGE)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target "$(GPU_PACKAGE)" .

# WORKERS=4 needs pytest-xdist.
WORKERS ?=
test-gpu: gpu-package
	$(GPU_PYTHON) -m pytest tests/kernels/test_gpu*.py tests/trainer -m gpu $(if $(WORKERS),-n $(WORKERS))

LIMIT ?= 300
TOKENS ?= 4k,8k,16k,32k,64k,128k
bench-gpu: gpu-package
	$(GPU_PYTHON) -m bifrost.kernels.bench --kernel all --tokens $(TOKENS) --limit $(LIMIT) --csv "$(OUT)/bench.csv" --json "$(OUT)/bench.json" --plots "$(OUT)"

# Started again, an interrupted run continues. Copies of the results go to RESULTS, if it is set.
BUDGET ?= 540
RESULTS ?=
device:
	$(PYTHON) docs/benchmarks/device.py --budget $(BUDGET) $(if $(RESULTS),--out "$(RESULTS)")

# Wheels for Python 3.12 on x86-64 Linux, of the packages that such a machine is likely to lack. DeepSpeed has no wheel on
# PyPI: it is built without its operators, which a run compiles if it needs them. Two shards stand in for `data demo`.
DEVICE_WHEELS := build/device-wheels
DEVICE_PACKAGES := annotated-types braceexpand certifi charset-normalizer diffusers einops emoji hjson idna \
  importlib-metadata liger-kernel msgpack ninja psutil py-cpuinfo pydantic pydantic-core requests resvg-py tenacity \
  typing-inspection urllib3 webdataset xxhash
MANYLINUX := $(foreach libc,2_28 2_27 2_24 2_17,--platform manylinux_$(libc)_x86_64) --platform manylinux2014_x86_64
PIP := $(BIN)/pip --disable-pip-version-check

device-wheels: $(READY)
	rm -rf $(DEVICE_WHEELS) build/device-demo
	mkdir -p $(DEVICE_WHEELS)/shards
	grep -v 'python_version <' constraints.txt | sed 's/;.*//' > build/device-pins.txt
	$(PIP) download --quiet --no-deps --only-binary :all: --python-version 3.12 --implementation cp $(MANYLINUX) \
	  -c build/device-pins.txt -d $(DEVICE_WHEELS) $(DEVICE_PACKAGES)
	DS_BUILD_OPS=0 $(PIP) wheel --quiet --no-deps --no-build-isolation -c constraints.txt -w $(DEVICE_WHEELS) deepspeed
	$(BIN)/bifrost data demo build/device-demo
	cp build/device-demo/train-0000[01].* $(DEVICE_WHEELS)/shards
	rm -rf build/device-demo build/device-pins.txt
	@size=$$(( $$(du -sm $(DEVICE_WHEELS) | cut -f1) + $$(git ls-files -z | du -cm --files0-from=- | tail -1 | cut -f1) )); \
	  echo "$(DEVICE_WHEELS) and the tracked files: $$size MiB, at most 64"; test $$size -le 64

clean:
	rm -rf .venv build *.egg-info

clean-runs:
	rm -rf demo runs
