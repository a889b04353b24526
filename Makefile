# make setup   a virtual environment in .venv with everything in it
# make demo    stage 1 on 1,800 drawings, two ranks, about three minutes after installation
# make test    the whole test suite
# make lint    ruff and pyright
# make kills   twenty SIGKILLs in a row over one run

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: setup demo test lint kills clean

setup: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(READY)
	$(BIN)/bifrost data demo demo
	$(BIN)/bifrost train recipes/tiny-mllm.yaml --ranks 2

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

kills: $(READY)
	$(BIN)/pytest tests/faults/test_kill.py --kills 20 -s

clean:
	rm -rf .venv build *.egg-info demo runs
