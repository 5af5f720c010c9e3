"""Loads a trained model from a run or a checkpoint, continues texts with it, and evaluates it.

Read ``loaded.py`` first: it has the model and its methods. ``load.py`` loads it; ``continuations.py`` continues
prompts; ``texts.py`` reads what is evaluated, and ``evaluation.py`` evaluates it. May import ``training.runs``,
``checkpoint`` and everything below.
"""
