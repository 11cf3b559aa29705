# Every target sets up what it needs: Python 3.10 or newer and a C++ compiler suffice.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench clean

demo: $(READY)  ## train on 2 ranks, resume on 1, leave runs/demo/curves.png
	rm -rf runs/demo
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_torchrun.py --out runs/demo
	$(BIN)/python examples/train_torchrun.py --out runs/demo --resume runs/demo/checkpoints --epochs 14

test: $(READY)  ## all tests, with real processes
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(READY)  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure against every peer (40 minutes), into benchmarks/results
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks

clean:
	rm -rf .venv runs build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	touch $(READY)
