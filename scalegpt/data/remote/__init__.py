"""Inputs that are no local paths: addresses such as ``s3://bucket/tokens``, data sets by their names, standard input.

Files at addresses are listed with fsspec and downloaded once, into the cache.
"""
