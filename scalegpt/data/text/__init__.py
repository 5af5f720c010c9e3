"""Text that users give: which files, which formats, which encodings.

Start with ``corpus``. May import :mod:`scalegpt.config` and below.
"""
