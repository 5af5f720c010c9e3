"""Runs the real step on tensors without data: the reference for the planner's figures, in tests and ``plan --trace``.

Start with ``trace``. This package may import :mod:`scalegpt.backends`, :mod:`scalegpt.optim` and below.
"""
