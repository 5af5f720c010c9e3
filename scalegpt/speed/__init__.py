"""Measures this machine's processor for the planner: ``probes`` times real steps, ``rates`` fits rates to their times.

Start with ``rates``. May import :mod:`scalegpt.optim`, :mod:`scalegpt.backends` and every layer below them.
"""
