"""The folder of a run: its files, its lock, what may change at a resume, what a start writes, its report.

Start with ``directory``. May import what lies below training.
"""
