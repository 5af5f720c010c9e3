"""Packs several documents into a training sequence: positions restart, and a mask keeps attention inside a document.

A document ends with its end-of-text token, which is part of it. Sizes: B micro batch, T sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.architecture.packing import MASK_ALIGNED


class Packing(NamedTuple):
    """The positions and the mask of a micro batch of packed documents.

    Attributes:
        positions: int64 [B, T], counted from the start of each document.
        mask: [B, 1, T, T] in the compute dtype: 0 where a token may attend to a token, else minus infinity. All blocks
            share it. Its rows are aligned, since torch's memory-efficient kernel would copy a mask whose rows are not.
    """

    positions: Tensor
    mask: Tensor


def pack(tokens: Tensor, end: int, dtype: torch.dtype) -> Packing:
    """Find the documents in sequences of ids [B, T]; ``end`` is the end-of-text token, ``dtype`` the mask's."""
    length = tokens.shape[1]
    begins = F.pad((tokens == end)[:, :-1], (1, 0), value=True)
    places = torch.arange(length, device=tokens.device)
    first = torch.where(begins, places, 0).cummax(dim=1).values
    return Packing(places - first, _mask(first, dtype))


def _mask(first: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [B, 1, T, T], from the position [B, T] at which the document of each token begins."""
    batch, length = first.shape
    row = -(-length // MASK_ALIGNED) * MASK_ALIGNED
    places = torch.arange(length, device=first.device)
    hidden = (places < first[:, :, None]).logical_or_(places > places[:, None])
    whole = torch.zeros(batch, 1, length, row, dtype=dtype, device=first.device)
    return whole[..., :length].masked_fill_(hidden[:, None], -torch.inf)


def counted_share(targets: Tensor) -> Tensor:
    """The share of targets that count in the loss, an fp32 scalar."""
    return (targets >= 0).float().mean()
