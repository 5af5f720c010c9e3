"""``scalegpt sample``: ``command`` reads the flags, ``prompts`` the texts to continue; ``printing`` and ``repl`` show text.

Read ``command.py`` first. May import all of :mod:`scalegpt`; torch only once the arguments have been checked.
"""

from scalegpt.cli.sample.command import SampleSettings, main

__all__ = ["SampleSettings", "main"]
