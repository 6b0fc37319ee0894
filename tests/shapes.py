"""Checks the annotations of the package while the tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # An int is a float.


def checked(function):
    """Checked, but for the constructors of Linen modules, which list fields of Flax's own types."""
    return function if function.__name__ == "__init__" else check(function)
