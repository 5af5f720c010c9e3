"""The catalogue of GPUs (``gpus.yaml``), the machine at hand (that this process runs on), and planned machines; no torch.

Read ``gpus`` first, which finds the card that a user means, then ``machine``, which describes the hardware of a plan.
Modules here may import :mod:`scalegpt.config` and packages below it.
"""
