"""Predicts the time of a training step from its work, its communication and a card's rates; without torch.

Start with ``step_time``. ``work`` counts FLOPs, bytes and kernels; ``rates`` has FLOP/s and bytes/s. Modules here may import
:mod:`scalegpt.planner.memory` and below.
"""
