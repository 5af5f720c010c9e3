"""The GPU suite: its rows (``rows.py``), the child process that takes them (``child.py``, ``measure.py``), and its report."""
