"""``scalegpt plan``: ``command`` reads the flags; ``text``, ``tables``, ``page`` and ``curves`` show the plan.

Read ``command.py`` first. ``wording.py`` has the words that all outputs share. May
import all of :mod:`scalegpt`; no torch.
"""

from scalegpt.cli.plan.command import main

__all__ = ["main"]
