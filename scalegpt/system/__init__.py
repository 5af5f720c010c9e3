"""What the operating system, the launchers and this installation say of a process; without torch.

Processes and their births, ranks, cores, standard streams, and the command that starts training. Read ``ranks`` first. May
import :mod:`scalegpt.errors`, :mod:`scalegpt.text` and :mod:`scalegpt.units`.
"""
