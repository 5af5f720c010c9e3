"""The optimizers, made from a backend's own (possibly sharded) parameters.

Start with :mod:`~scalegpt.optim.factory`. What each optimizer keeps and needs is said in
:mod:`scalegpt.config.optimizers`. May import :mod:`scalegpt.backends`, :mod:`scalegpt.planner` and what lies below
them.
"""
