"""How many bytes a training step holds at its fullest moment; without torch.

Start with ``predict``: it plays a step (``step``, ``fsdp``, ``deepspeed/``) on a ``timeline``. What a block does comes from
:mod:`scalegpt.architecture` through ``tape``. May import :mod:`scalegpt.hardware`, :mod:`scalegpt.architecture` and below.
"""
