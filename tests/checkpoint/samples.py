"""Small checkpoints to write, read and damage."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends.base import WEIGHT, Piece
from scalegpt.checkpoint import writer
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.config.optimizers import EXP_AVG, EXP_AVG_SQ
from scalegpt.errors import RunError

KEYS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
SHAPES: Mapping[str, tuple[int, ...]] = {"wte.weight": (11, 4), "norm.weight": (5,), "one": (1,)}
TENSORS = {f"{key}/{name}": shape for name, shape in SHAPES.items() for key in KEYS}
PROGRESS = Progress(
    step=7, tokens=700, val_loss=2.5, best_val_loss=2.25, skipped_steps=3, loss_scale=1024.0, good_steps=5, seed=9,
    sequences=56,
)  # fmt: skip


def header(progress: Progress = PROGRESS, **parts: Any) -> Header:
    return Header(progress, {"model": {"n_layer": 1}}, {"kind": "byte"}, "data's digest", "run's id", parts)


def at(step: int, **values: Any) -> Header:
    return header(Progress(step=step, tokens=step, **values))


def whole(seed: int = 0) -> list[Piece]:
    """Every tensor in one piece."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Piece(name, key, 0, torch.randn(math.prod(shape), generator=generator))
        for name, shape in SHAPES.items()
        for key in KEYS
    ]


def cut(pieces: list[Piece], ranks: int) -> list[list[Piece]]:
    """The pieces that fall to each of several ranks."""
    shares = [[piece.share(rank, ranks) for piece in pieces] for rank in range(ranks)]
    return [[piece for piece in share if piece.values.numel()] for share in shares]


def save_alone(folder: Path, head: Header, pieces: list[Piece], tensors: writer.Shapes) -> Path:
    """Write a checkpoint in one process; nothing is left of one that cannot be written, as :class:`Saver` has it."""
    begun = writer.begin(folder, head.progress.step, 1, writer.bytes_of(pieces))
    try:
        writer.write_part(begun, 0, pieces)
        return writer.commit(begun, head, tensors)
    except RunError:
        shutil.rmtree(begun.temporary)
        raise


def save(folder: Path, head: Header | None = None, seed: int = 0) -> Path:
    return save_alone(folder, head or header(), whole(seed), TENSORS)
