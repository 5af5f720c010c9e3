"""Kernels that only a CPU uses: attention by batched matmuls, and a chunk's loss with tokens side by side.

May import torch, and of the model :mod:`scalegpt.model.chunk` alone.
"""
