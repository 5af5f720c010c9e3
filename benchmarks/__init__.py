"""Benchmarks: each is a program of its own."""
