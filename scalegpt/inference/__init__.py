"""A trained model, loaded from a run or a checkpoint to be used: to continue texts, and to be evaluated.

Read ``loaded.py`` first, the model and what it does. ``load.py`` loads it; ``continuations.py`` continues prompts;
``texts.py`` reads what is evaluated, and ``evaluation.py`` evaluates it. May import ``training.runs``, ``checkpoint`` and
everything below.
"""
