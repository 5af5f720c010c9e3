"""Protection against losing a run: stopping, watchdog, heartbeats, guards, rollback, out of memory, failures.

Start with ``failure``, which says how a run ends. This package may import :mod:`scalegpt.training.runs` and every layer below
training.
"""
