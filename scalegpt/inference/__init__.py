"""Load a trained model from a run or a checkpoint.

Start with ``load``. May import :mod:`scalegpt.training.runs` and below.
"""
