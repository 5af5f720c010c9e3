"""Writes trained models for other programs: as a Hugging Face folder, or as a GGUF file for ``llama.cpp``.

``source.py`` has the model to be written, and each format has a module. May import ``weights`` and everything below it.
"""
