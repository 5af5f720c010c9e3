"""DeepSpeed's ZeRO behind the interface of :mod:`scalegpt.backends.base`.

Start with ``engine``.
"""
