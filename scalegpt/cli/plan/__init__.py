"""``scalegpt plan``: ``command`` reads the flags; ``text``, ``tables``, ``page`` and ``curves`` show what was planned.

Read ``command.py`` first; what text and page share is in ``wording.py``. May import all of :mod:`scalegpt`; no torch.
"""

from scalegpt.cli.plan.command import main

__all__ = ["main"]
