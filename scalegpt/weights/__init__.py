"""Weights between the formats of other programs and ours, one tensor at a time.

``layouts.py`` and ``table.py`` say where each family keeps which numbers, ``files.py`` reads files of weights, and
``origin.py`` makes of a folder a model to start from. May import ``checkpoint`` and everything below.
"""
