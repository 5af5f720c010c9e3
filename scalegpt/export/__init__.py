"""Trained models written for other programs: as a Hugging Face folder, or as a GGUF file for ``llama.cpp``.

``source.py`` is what is written; each format has a module. May import ``weights`` and everything below it.
"""
