"""The catalogue of GPUs (``gpus.yaml``), the GPUs of the machine at hand, and the machines that plans are for; without torch.

Read ``gpus`` first, which finds the card that a user means, then ``machine``, which describes the hardware of a plan.
Modules here may import :mod:`scalegpt.config` and packages below it.
"""
