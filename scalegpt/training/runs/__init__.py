"""The folder of a run: its files, its lock, its checkpoint to resume from, what may change at a resume, its report.

Start with ``directory``. May import what lies below training, and :mod:`scalegpt.training.schedules`.
"""
