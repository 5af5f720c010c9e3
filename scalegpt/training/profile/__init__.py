"""Profiles of single steps: torch's traces, and their operators beside the times that the planner predicted.

:mod:`~scalegpt.training.profile.recorder` records, ``operators`` adds up what was recorded.
"""
