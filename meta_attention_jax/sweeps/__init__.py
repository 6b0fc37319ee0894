"""Sweeps: the algebra of points (`space`), many points trained as one program (`together`, `group`), and the machines
that run groups of them (`engine`)."""
