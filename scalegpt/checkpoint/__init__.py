"""The checkpoint that every backend writes and reads: canonical tensors, digests, an atomic store.

Read ``manifest.py`` first, which says what a checkpoint holds. ``writer.py`` writes a checkpoint, ``saver.py`` saves
during training, ``reader.py`` verifies and reads a checkpoint, ``store.py`` finds and deletes checkpoints. May import
``backends`` and everything below.
"""
