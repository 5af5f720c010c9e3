"""What keeps a run from being lost: stopping, watchdog, heartbeats, guards, rollback, out of memory, failures.

Start with ``failure``: how a run ends. May import :mod:`scalegpt.training.runs` and what lies below training.
"""
