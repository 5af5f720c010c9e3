"""Profiles of single steps: torch's traces, and a table of measured and predicted times.

:mod:`~scalegpt.training.profile.recorder` records, ``operators`` adds up what was recorded.
"""
