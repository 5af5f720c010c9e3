"""Text to tokens, and tokens to training windows: tokenizers, preparation, cache, token files, the order of windows.

Read ``prepare`` first, then ``shards`` and ``sampler``. :mod:`scalegpt.data.text` finds and decodes the text. May import
:mod:`scalegpt.config` and what lies below it, and numpy; no torch.
"""
