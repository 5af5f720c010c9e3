"""Trackers: programs outside of the run's folder that show its metrics, chosen with ``--log_to``.

``metrics.jsonl`` and ``samples.txt`` are the truth, and a tracker's record is a copy of them. So a record can always be
brought into line: after a kill and a resume, after an outage of the network, or where a run gains a tracker halfway.
:mod:`~scalegpt.training.trackers.feed` sends; a module for each program says how its record continues and what it can undo.
"""
