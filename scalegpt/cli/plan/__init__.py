"""``scalegpt plan``: ``command`` reads the flags, ``text`` and ``tables`` print plans, ``ui`` serves the page that plans.

Read ``command.py`` first; :mod:`scalegpt.plan_page` has the words and the pages. May import all of :mod:`scalegpt`, but
not torch.
"""

from scalegpt.cli.plan.command import main

__all__ = ["main"]
