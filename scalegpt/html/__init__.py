"""One engine for pages and charts: a page that needs no network, and SVG charts in it.

Start with ``page``. May import :mod:`scalegpt.text`.
"""
