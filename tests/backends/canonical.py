"""The canonical state as whole tensors: gathered from all ranks' pieces, and drawn at random. For tests of small models."""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from scalegpt.backends import Backend
from scalegpt.backends.base import Piece, ReadTensor

Whole = dict[tuple[str, str], Tensor]
"""(name, key) → the whole tensor, flattened."""


def gathered(backend: Backend) -> Whole:
    """Every rank's pieces put together; each element must come from exactly one rank."""
    mine = [(piece.name, piece.key, piece.start, piece.values.to("cpu", copy=True)) for piece in backend.pieces()]
    parts = [mine]
    if backend.world.size > 1:
        parts = [[] for _ in range(backend.world.size)]
        dist.all_gather_object(parts, mine)
    whole = {
        (name, key): torch.full((math.prod(shape),), math.nan)
        for name, shape in shapes(backend)
        for key in backend.keys_of(name)
    }
    counts = {entry: torch.zeros(len(values), dtype=torch.int64) for entry, values in whole.items()}
    for name, key, start, values in (piece for part in parts for piece in part):
        assert values.dtype == torch.float32
        assert values.dim() == 1
        assert 0 < len(values) <= len(whole[name, key]) - start
        whole[name, key][start : start + len(values)] = values
        counts[name, key][start : start + len(values)] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    return whole


def shapes(backend: Backend) -> Iterable[tuple[str, tuple[int, ...]]]:
    return backend.model.shapes.items()


def drawn(backend: Backend, seed: int) -> Whole:
    """A random state: any weights, and moments such as training makes."""
    generator = torch.Generator().manual_seed(seed)
    whole = {}
    for name, shape in shapes(backend):
        keys = backend.keys_of(name)
        values = torch.randn(len(keys), math.prod(shape), generator=generator) * 0.02
        values = [value.square() if key == "exp_avg_sq" else value for key, value in zip(keys, values, strict=True)]
        whole |= {(name, key): value for key, value in zip(keys, values, strict=True)}
    return whole


def reader(whole: Whole) -> ReadTensor:
    return lambda name, key, start, count: whole[name, key][start : start + count]


def digest(whole: Whole) -> str:
    """SHA-256 over all bits in the order of names and keys."""
    total = hashlib.sha256()
    for (name, key), values in sorted(whole.items()):
        total.update(f"{name} {key} {len(values)}".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()


def pieces_of(whole: Whole) -> list[Piece]:
    """Each whole tensor as one piece."""
    return [Piece(name, key, 0, values) for (name, key), values in whole.items()]
