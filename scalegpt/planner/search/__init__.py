"""Which plan is the fastest that fits.

Start with ``choose``. May import all other parts of the planner except ``query``.
"""
