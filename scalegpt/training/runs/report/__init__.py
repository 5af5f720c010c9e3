"""A run's ``report.html``, and the page of ``scalegpt report`` that lays several runs over one another.

:mod:`~scalegpt.training.runs.report.read` reads runs, ``curves`` draws, ``page`` puts the page together.
"""
