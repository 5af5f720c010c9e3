"""Reads and writes the model configurations of other programs."""
