"""How long a training step takes: its work, the rates of a card, communication; without torch.

Start with ``step_time``; ``work`` counts, ``rates`` says how fast. May import :mod:`scalegpt.planner.memory` and below.
"""
