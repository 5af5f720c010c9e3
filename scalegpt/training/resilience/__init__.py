"""What keeps a run from being lost when it is stopped, hangs, diverges, runs out of memory, or fails.

Start with ``failure``, which says how a run ends. This package may import :mod:`scalegpt.training.runs` and every layer below
training.
"""
