"""The process and its surroundings: ranks, launchers, other processes, cores and memory, standard streams.

Also the command that starts training with this installation. Read ``ranks`` first. May import :mod:`scalegpt.errors`,
:mod:`scalegpt.text` and :mod:`scalegpt.units`; no torch.
"""
