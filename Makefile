# Each command does its own set-up first: virtual environment, install, data.
PYTHON ?= python3
BIN := .venv/bin
DATASET := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.PHONY: demo quick test check lint setup data clean

demo: setup data  ## teacher → student → integers → four targets on Fashion-MNIST (about 8 minutes)
	$(BIN)/edgekd run fashion-mnist

quick: setup data  ## the same on a subset, in under three minutes
	$(BIN)/edgekd run fashion-mnist-quick

test: setup data  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: lint test  ## what CI runs

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } || \
	  { echo 'Python has no venv here; run: sudo apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[detection,openvino,tensorrt,timm,dev]'
	@touch $@

data:
	@[ -f $(DATASET) ] || ! command -v apt-get >/dev/null || \
	  if [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist || \
	    echo 'dataset-fashion-mnist is not to be had from apt; torchvision will download it'; \
	  else \
	    echo 'Fashion-MNIST: sudo apt-get install dataset-fashion-mnist, or torchvision downloads it'; \
	  fi

clean:
	rm -rf .venv build dist
