# `make demo` and `make test` set themselves up: a virtual environment of their own, with the pins.
# PYTHON may name an interpreter; otherwise the first 3.12 or 3.11 that is found.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
  && { echo $$p; break; }; done)
READY = $(VENV)/.ready
BIN = $(VENV)/bin

.PHONY: demo test slow smoke clean

demo: $(READY)
	$(BIN)/python -m experiments.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

smoke: $(READY)
	$(BIN)/python -m pytest -m smoke

$(READY): requirements.txt
	@test -n "$(PYTHON)" || { echo "error: python: expected Python 3.11 or 3.12 on PATH (or make PYTHON=...), got neither." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV)
