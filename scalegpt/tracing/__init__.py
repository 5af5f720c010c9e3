"""The real step on tensors without data: the planner's oracle, for tests and ``scalegpt plan --trace``.

Start with ``trace``. This package may import :mod:`scalegpt.backends`, :mod:`scalegpt.optim` and below.
"""
