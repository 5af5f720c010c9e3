"""What keeps a run from being lost: stopping, watchdog, heartbeats, guards, rollback, memory that runs out, failures.

Start with ``failure``, which says how a run ends. May import :mod:`scalegpt.training.runs` and what lies below training.
"""
