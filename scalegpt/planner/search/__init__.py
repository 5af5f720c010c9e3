"""The search for the fastest plan that fits.

Start with ``choose``. Modules here may import all other parts of the planner except ``query``.
"""
