"""The memory that packing documents adds to a micro batch: positions and a mask, which all blocks share.

:mod:`scalegpt.model.packing` makes them. Symbols: B sequences of the micro batch, T tokens of a sequence, R numbers of a head
that are rotated, c bytes of the compute dtype.
"""

from dataclasses import dataclass

from scalegpt.architecture.layers import FP32
from scalegpt.config import ModelConfig

MASK_ALIGNED = 8
"""The rows of a mask are padded in memory to a multiple of this many elements, since torch's memory-efficient kernel
would copy other masks (``attention.cpp: preprocess_mask``).
"""

_INT64 = 8


@dataclass(frozen=True)
class PackingSizes:
    """Bytes that a micro batch of packed documents holds from its embedding to the backward pass of its first block.

    Attributes:
        positions: int64 [B, T]; learned positions keep them for their backward pass.
        mask: [B, 1, T, T] in the compute dtype, with aligned rows.
        turns: the rows of the rotary table, fp32 [B, T, R]; 0 without rotary positions.
        finding: temporaries of finding the positions: four tensors of their size.
        masking: temporaries of making the mask: the first position of each token's document [B, T], and a byte for each
            pair of tokens.
    """

    positions: int
    mask: int
    turns: int
    finding: tuple[int, ...]
    masking: tuple[int, ...]

    @classmethod
    def of(cls, model: ModelConfig, batch: int, element: int) -> "PackingSizes":
        """The sizes for ``batch`` sequences, with ``element`` bytes in the compute dtype."""
        tokens = model.block_size
        row = -(-tokens // MASK_ALIGNED) * MASK_ALIGNED
        positions = _INT64 * batch * tokens
        turns = FP32 * batch * tokens * model.rotary_width if model.position == "rope" else 0
        masking = positions, batch * tokens**2
        return cls(positions, element * batch * tokens * row, turns, (positions,) * 4, masking)
