"""The text that users give: which files, which formats, which encodings.

Read ``corpus`` first. May import :mod:`scalegpt.config` and what lies below it, :mod:`scalegpt.data.tokenizers`, and numpy.
"""
