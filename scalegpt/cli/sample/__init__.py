"""``scalegpt sample``: ``command`` reads the flags, ``prompts`` reads the prompts, ``printing`` and ``repl`` show text.

Read ``command.py`` first. May import all of :mod:`scalegpt`. Torch is imported only after the arguments have been
checked.
"""

from scalegpt.cli.sample.command import SampleSettings, main

__all__ = ["SampleSettings", "main"]
