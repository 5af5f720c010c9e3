"""The optimizers, made from a backend's own (possibly sharded) parameters.

Start with ``factory.py``. What each optimizer keeps and needs is in :mod:`scalegpt.config.optimizers`. May import
``backends``, ``planner`` and everything below.
"""
