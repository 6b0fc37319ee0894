"""The comparison itself: it has to fail where it should."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close


def test_small_entries_of_a_large_array_may_differ():
    assert_close(np.array([1e3, 1e-3 + 1e-4]), np.array([1e3, 1e-3]), 1e-6)
    assert_close({"a": jnp.ones(3), "b": 2.0}, {"a": np.ones(3), "b": 2.0}, 0.0)
    assert_close(np.full(3, -np.inf), np.full(3, -np.inf))


@pytest.mark.parametrize("got, expected", [
    ([1.0, 2.0], [1.0, 2.1]),
    ([1.0, np.nan], [1.0, 2.0]),
    ([1.0, np.inf], [1.0, 2.0]),
    ([1.0, 2.0], [1.0, np.inf]),
    ([1.0, np.inf], [1.0, -np.inf]),
    ([np.nan], [np.nan]),
    (np.ones(2), np.ones((1, 2))),
    ([1.0], [1.0, 1.0]),
    (np.append(np.ones(10_000), 1.01), np.ones(10_001)),  # One entry that the norm would pass.
])
def test_what_differs_is_told(got, expected):
    with pytest.raises(AssertionError):
        assert_close(np.array(got), np.array(expected), 1e-3)
