"""``scalegpt plan``: start with ``command``; ``text``, ``tables``, ``page`` and ``curves`` show what was planned."""

from scalegpt.cli.plan.command import main

__all__ = ["main"]
