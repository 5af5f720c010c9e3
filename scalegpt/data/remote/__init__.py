"""Inputs at addresses such as ``s3://bucket/tokens``: files are listed with fsspec and downloaded once, into the cache."""
