"""The peak memory of a training step, predicted without torch.

Start with ``predict``: it simulates a step (``step``, ``fsdp``, ``deepspeed/``) on a ``timeline``. ``tape`` turns the
operations of a block, from :mod:`scalegpt.architecture`, into allocations and frees. This package may import
:mod:`scalegpt.hardware`, :mod:`scalegpt.architecture` and below.
"""
