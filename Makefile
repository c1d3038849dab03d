# Every target sets up what it needs: a virtual environment here, system packages through apt.
VENV ?= .venv
BIN := $(VENV)/bin
MUTANTS := build/mutants-venv

.PHONY: demo test check e2e fuzz bench mutants clean

demo: $(VENV)/.run
	$(BIN)/python -m pgofflined demo

test: $(VENV)/.dev | system-test
	$(BIN)/python -m pytest -m "not e2e" tests

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_links.py

e2e: $(VENV)/.dev | system-e2e
	$(BIN)/python -m pytest -m e2e tests/e2e $(E2E)

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz.hostile 100000

bench: $(VENV)/.dev | system-e2e
	$(BIN)/python -m bench

mutants: $(MUTANTS)/.mutants
	nice -n 15 $(MUTANTS)/bin/python -m tests.mutants $(if $(AGAIN),--again) $(MODULES)

clean:
	rm -rf $(VENV) build dist *.egg-info

.PHONY: system-test system-e2e
system-test:
	@scripts/system-packages tests/apt-packages.txt
system-e2e:
	@scripts/system-packages tests/apt-packages.txt tests/e2e/apt-packages.txt

$(VENV)/bin/python:
	@scripts/make-venv $(VENV)

# Of its own: mutmut brings a parser of Python and a user interface along.
$(MUTANTS)/.mutants: requirements-mutants.txt requirements-dev.txt requirements-run.txt
	@scripts/make-venv $(MUTANTS)
	$(MUTANTS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-mutants.txt
	@touch $@

$(VENV)/.run: requirements-run.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-run.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
