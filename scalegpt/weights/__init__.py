"""Converts weights between the formats of other programs and ours, one tensor at a time.

``layouts.py`` and ``table.py`` say which tensor of a family holds which of our parameters, ``files.py`` reads files of
weights, and ``origin.py`` turns a folder into the model from which a run starts. May import ``checkpoint`` and
everything below.
"""
