"""Strictness for every test: no silent rank promotion, no warnings, no progress bars."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and compute little. This is the last stage alone: what XLA makes of a program
# (fusions, buffers, collectives) stays as it is.
given = os.environ.get("XLA_FLAGS", "")
if "--xla_backend_optimization_level" not in given:
    os.environ["XLA_FLAGS"] = f"{given} --xla_backend_optimization_level=0".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
