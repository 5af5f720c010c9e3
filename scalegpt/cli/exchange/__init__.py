"""``scalegpt import`` and ``scalegpt export``, one module each: models from other programs, and for other programs.

May import all of :mod:`scalegpt`. Torch is imported only after the arguments have been checked.
"""
