# Everything a contributor types, in short. `make` alone lists the targets; each makes .venv on its first use.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test fast exact fuzz faults check format types ci clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(READY)

demo: $(READY) ## fine-tune an SE network on the built-in data and draw what it finds
	$(PY) train.py --cfg yolov5n-se-last.yaml --weights yolov5n-shapes.pt --data shapes.yaml \
		--hyp hyp.shapes.yaml --optimizer AdamW --img 320 --batch 16 --epochs 3 --cache --name demo --exist-ok
	$(PY) detect.py --weights runs/train/demo/weights/best.pt --source data/images --img 320 --name demo --exist-ok
	@echo "Look at runs/train/demo (curves, batches) and runs/detect/demo (boxes on pictures)."

test: $(READY) ## run every test
	$(PY) -m pytest

fast: $(READY) ## run the tests that take seconds
	$(PY) -m pytest -m "not slow"

exact: $(READY) ## every gate at every place of every network, bit for bit (an hour)
	EXACT=all $(PY) -m pytest tests/test_exact.py tests/test_inside.py -s

fuzz: $(READY) ## attack every reader of files, for SECONDS=1200 in all
	$(PY) -m tests.fuzz --seconds $(or $(SECONDS),1200)

faults: $(READY) ## kill trainings KILLS=50 times; all must end like an undisturbed one
	$(PY) -m tests.faults --kills $(or $(KILLS),50)

check: $(READY) ## what to run before every commit: format, lint, types, fast tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -m "not slow"

format: $(READY) ## format the code and mend what the linter can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

types: $(READY) ## check the types
	$(VENV)/bin/mypy

ci: ## the whole check from nothing, in an environment of its own
	.ci/run

clean: ## remove caches; runs, .venv and data stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
