"""Benchmarks: each module of this folder that has a ``main`` is a program of its own."""
