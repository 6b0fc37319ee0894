"""Sweeps: the algebra of points (`space`), many points trained as one program (`together`, `group`), the machines that
run groups of them (`engine`), and Optuna, which proposes them (`search`)."""
