"""Does Bayesian routing, token by token, earn its place on a published model? `python -m
experiments.studies.pretrained.compare`."""
