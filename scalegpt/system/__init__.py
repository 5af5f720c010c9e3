"""What the operating system, the launchers and this installation tell; without torch.

Processes and their births, ranks, cores, standard streams, and how to start training here. May import
:mod:`scalegpt.errors` and :mod:`scalegpt.text`.
"""
