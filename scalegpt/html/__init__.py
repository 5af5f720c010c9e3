"""Pages that need no network (``page.py``, read first) and the SVG charts in them (``svg.py``).

May import :mod:`scalegpt.text`.
"""
