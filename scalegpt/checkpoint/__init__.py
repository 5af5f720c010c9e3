"""The checkpoint that every backend writes and reads: canonical tensors, digests, an atomic store.

Read ``manifest.py`` first, which says what a checkpoint holds. ``writer.py`` makes one, ``saver.py`` does so during training,
``reader.py`` verifies and reads one, ``store.py`` finds and deletes them. May import ``backends`` and everything below.
"""
