PYTHON ?= python3
BIN = $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)

.PHONY: demo test lint format

demo: .venv/ready  ## train the DCGAN for a few minutes on the built-in data
	$(BIN)/python train_dcgan.py --dataset glyphs --width 0.5 --epochs 12 --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/ready lint  ## all checks
	$(BIN)/python -m pytest -q

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
