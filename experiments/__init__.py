"""Thin mains over the package; each is `python -m experiments.<name> --help`."""
