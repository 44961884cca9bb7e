PYTHON ?= python3
BIN = $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)

.PHONY: demo test results gpu lint format

demo: .venv/ready  ## train the DCGAN for a few minutes on the built-in data
	$(BIN)/python train_dcgan.py --dataset glyphs --width 0.5 --epochs 12 --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/ready lint  ## all checks
	$(BIN)/python -m pytest -q

results: .venv/ready  ## the pictures and numbers of results/ and benchmarks/ that have no run yet: hours
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-dev.txt
	$(BIN)/python benchmarks/results.py

gpu: .venv/ready  ## all that wants a GPU, within eight minutes, in one table
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-dev.txt
	$(BIN)/python benchmarks/gpu.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made on first use, and again only when requirements.txt changes.
.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing requirements.txt into .venv: some 5 GB, a few minutes'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@
