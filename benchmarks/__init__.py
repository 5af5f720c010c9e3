"""Measurements: each script says in its docstring what it measures and how it is run. Results lie in ``results/``."""
