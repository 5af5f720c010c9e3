"""Kernels that only a CPU uses: attention by batched matmuls, and a chunk's loss from logits [V, k].

This package may import torch, and from the model :mod:`scalegpt.model.chunk` alone.
"""
