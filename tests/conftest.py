"""Strictness for every test: no silent rank promotion, no warnings, no progress bars."""

import atexit
import importlib.metadata
import os
import pathlib
import re
import shutil
import tempfile
import tomllib

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The products of float64 references are small: several threads take ten times the CPU time of one, waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The tests compile much and compute little. This is the last stage alone: what XLA makes of a program
# (fusions, buffers, collectives) stays as it is.
given = os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_PLATFORMS"] == "cpu" and "--xla_backend_optimization_level" not in given:
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones do not know it.
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{given} {quick}".strip()

# Many tests train the same small runs: what one has compiled, the others read, in every worker and in
# the commands that they start. The process that made the folder removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="meta-attention-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# Every call of the package is checked against its annotations, at a price in time.
if os.environ.get("CHECK_SHAPES"):
    import jaxtyping

    import tests.shapes  # noqa: F401

    jaxtyping.install_import_hook("meta_attention_jax", "tests.shapes.checked")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What a file has compiled is of no use to the next one, and fills gigabytes."""
    yield
    jax.clear_caches()


# Few tests and long ones: where a worker takes whole files, these must not be its last.
FIRST = (
    "commands", "retrofit", "training", "packed_training", "together", "faults", "old_run", "house", "moved", "sweep",
    "output",
)


# Every extra is a marker: of tests that need its packages, and that `make extras EXTRA=...` runs.
EXTRAS = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = EXTRAS["project"]["optional-dependencies"]


def pytest_configure(config):
    for extra in EXTRAS:
        config.addinivalue_line("markers", f"{extra}: needs the extra {extra}")


def installed(package):
    try:
        return importlib.metadata.version(package) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def pytest_runtest_setup(item):
    for extra in EXTRAS.keys() & {mark.name for mark in item.iter_markers()}:
        missing = [name for name in (re.match(r"[\w.-]+", one)[0] for one in EXTRAS[extra]) if not installed(name)]
        if missing:
            pytest.skip(f"the extra {extra} is not installed: {', '.join(missing)}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)
