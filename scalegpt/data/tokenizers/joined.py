"""Encode several texts in one call of tiktoken, during which other threads run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SEPARATOR = "\0<|text|>\1"
"""A special token of our encodings that stands between texts; a text that has these characters is encoded alone.

No end of it is a beginning of it, so the end of a text and the separator after it form no other one.
"""


def encode_texts(encoding: Any, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]] | None:
    """The ids of each text, uint32 [N]; None if the texts cannot be encoded together.

    tiktoken encodes what is between special tokens as texts of their own. Each call takes Python's global lock twice, which
    costs more than the encoding of a short text if other threads hold it.

    Args:
        encoding: a tiktoken encoding with :data:`SEPARATOR` as a special token.
        texts: the texts.

    Raises:
        ValueError: tiktoken's regular expressions overflow their stack.
        UnicodeEncodeError: a text has a lone surrogate.
    """
    if len(texts) < 2:
        return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
    if any(SEPARATOR in text for text in texts):
        return None
    ids = encoding.encode_to_numpy(SEPARATOR.join(texts), allowed_special={SEPARATOR}, disallowed_special=())
    places = np.flatnonzero(ids == encoding.encode_single_token(SEPARATOR))
    bounds = zip([0, *(places + 1).tolist()], [*places.tolist(), len(ids)], strict=True)
    return [ids[first:end] for first, end in bounds]
