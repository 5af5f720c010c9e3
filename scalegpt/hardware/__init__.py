"""Known GPUs (``gpus.yaml``), the GPUs at hand, and the machines around them; without torch.

Read ``gpus`` first, which finds the card that a user means, then ``machine``, for which plans are made. May import
:mod:`scalegpt.config` and what lies below it.
"""
