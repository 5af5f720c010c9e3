"""The optimizers, made from a backend's own (possibly sharded) parameters.

Start with ``factory.py``. :mod:`scalegpt.config.optimizers` describes the state and the memory of each optimizer. May
import ``backends``, ``planner`` and everything below.
"""
