"""Checkpoints: one canonical form that every backend reads and writes."""
