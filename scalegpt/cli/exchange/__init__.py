"""``scalegpt import`` and ``scalegpt export``: models from and for other programs; one module each.

May import all of :mod:`scalegpt`; torch only once the arguments have been checked.
"""
