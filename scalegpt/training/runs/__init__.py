"""A run's folder: its files and lock, the checkpoint to resume from, the settings that a resume may change, the report.

Start with ``directory``. This package may import every layer below training, and :mod:`scalegpt.training.schedules`.
"""
