"""How two programs' float results are compared: by norm.

Two programs sum in different orders, and so does one program on different CPUs. An entry that is small
because large ones cancelled differs by the rounding of the large ones, so entries have no tolerance of
their own: the whole array's does.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def distance(got: Any, expected: Any) -> float:
    """||got - expected|| / ||expected||, all leaves as one vector."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (got, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_close(got: Any, expected: Any, tol: float = 1e-5, what: str = "") -> None:
    """Every leaf: ||got - expected|| <= tol ||expected||, and the largest difference <= tol times the
    largest entry. Shapes must match; NaN matches nothing; infinities must be the same."""
    names, leaves = zip(*jax.tree_util.tree_leaves_with_path(expected), strict=True)
    ours = jax.tree.leaves(got)
    assert len(ours) == len(leaves), f"{what}: {len(leaves)} arrays expected, got {len(ours)}"
    for name, a, b in zip(names, ours, leaves, strict=True):
        label = f"{what}{jax.tree_util.keystr(name)}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{label}: shape {b.shape} expected, got {a.shape}"
        infinite = np.isinf(b)
        assert np.array_equal(a[infinite], b[infinite]), f"{label}: infinities differ"
        difference, reference = a[~infinite] - b[~infinite], b[~infinite]
        if not difference.size:
            continue
        norm, scale = np.linalg.norm(difference), np.linalg.norm(reference)
        assert norm <= tol * scale, f"{label}: ||difference|| = {norm:.3g}, of ||expected|| = {scale:.3g}"
        most, largest = np.abs(difference).max(), np.abs(reference).max()
        assert most <= tol * largest, f"{label}: largest difference {most:.3g}, of entries to {largest:.3g}"
