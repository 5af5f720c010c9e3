"""Read files of records: JSON Lines, JSON arrays, CSV, Parquet, Arrow. One field of each record holds a document's text.

Read ``base`` first; ``table`` lists the formats. May import :mod:`scalegpt.data.text.packed`, ``formats`` and ``decoding``.
"""
