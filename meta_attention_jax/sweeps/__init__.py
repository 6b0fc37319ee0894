"""Sweeps: the algebra of points (`space`), and many points trained as one program (`together`, `group`)."""
