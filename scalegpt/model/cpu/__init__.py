"""Kernels that only a CPU uses: attention by batched matmuls, and a chunk's loss with tokens side by side.

The model is read without them: :mod:`scalegpt.model.gpt` and :mod:`scalegpt.model.loss` call torch's kernels unless these are
handed to them. May import torch, and of the model :mod:`scalegpt.model.chunk` alone.
"""
