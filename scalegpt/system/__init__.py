"""The process and its surroundings: ranks, launchers, other processes, cores and memory, standard streams.

``invocation`` has the command that starts training with this installation. Read ``ranks`` first. Modules here may import
:mod:`scalegpt.errors`, :mod:`scalegpt.text` and :mod:`scalegpt.units`, but not torch.
"""
