"""A training run: its set-up, its loop, its evaluations, samples and metrics.

``setup/`` turns a request into a job; ``runs/`` knows the run's folder; ``resilience/`` keeps a run from being lost. Start
with ``run.py``, which joins them, then ``setup/prepare.py`` and ``trainer.py``. May import everything below training, but no
command.
"""
