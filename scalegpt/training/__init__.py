"""A training run: its set-up, its loop, its evaluations, samples and metrics.

``setup/`` turns a request into a job. ``runs/`` reads and writes the run's folder. ``resilience/`` protects a run
against faults. Start with ``run.py``, which calls all three, then read ``setup/prepare.py`` and ``trainer.py``. This
package may import every layer below it, and no command.
"""
