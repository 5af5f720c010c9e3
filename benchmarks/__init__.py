"""Benchmarks. Each module of this folder with a ``main`` is a separate program."""
