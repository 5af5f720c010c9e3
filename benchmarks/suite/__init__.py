"""The parts of ``gpu_suite.py``: a frame that all its suites share, and the suites."""
