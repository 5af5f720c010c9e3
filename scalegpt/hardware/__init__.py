"""The GPUs that are known (``gpus.yaml``), those at hand, and the machines around them; without torch.

Start with ``gpus``, which finds the card that a user means; ``machine`` is what plans are made for. May import
:mod:`scalegpt.config` and what lies below.
"""
