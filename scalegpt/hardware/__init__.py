"""The catalogue of GPUs (``gpus.yaml``), this machine's hardware, and the machines of plans. No torch.

Read ``gpus`` first, which finds the card that a user means, then ``machine``, which describes the hardware of a plan.
Modules here may import :mod:`scalegpt.config` and packages below it.
"""
