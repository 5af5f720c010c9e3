"""A trained model, loaded from a run or a checkpoint to be used.

Read ``load.py`` first, which finds and loads a model; ``loaded.py`` turns a prompt into text. May import
``training.runs``, ``checkpoint`` and everything below.
"""
