"""The GPU suite: its rows (``rows.py``), the child process that measures them (``child.py``, ``measure.py``), its report."""
