"""Preparing text for training: what a preparation is, which text is held out, encoding on all cores, writing shards.

Read ``identity`` first, then ``batches``, ``encoding`` and ``writer``; :mod:`scalegpt.data.prepare` joins them.
"""
