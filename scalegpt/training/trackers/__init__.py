"""Trackers: other programs that show a run's metrics, chosen with ``--log_to``.

A tracker's record is a copy of ``metrics.jsonl`` and ``samples.txt``. It can therefore always be corrected from these
files: after a kill and a resume, after an outage of the network, or if the user adds a tracker to a run.
:mod:`~scalegpt.training.trackers.feed` sends the entries. A module for each program continues its record and undoes
steps.
"""
