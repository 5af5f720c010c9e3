"""Token files in the layouts of other programs, written byte by byte from their descriptions."""

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_llmc(path: Path, ids: Sequence[int], model: str = "gpt-2") -> Path:
    """llm.c, dev/data/data_common.py: 256 int32, of which the first are magic, version and the number of tokens; the ids."""
    magic, version, dtype = {"gpt-2": (20240520, 1, "<u2"), "llama-3": (20240801, 7, "<u4")}[model]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())
    return path


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16") -> Path:
    """Megatron-LM, indexed_dataset.py: ``documents`` hold sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(each) for each in sequences], dtype="<i4")
    width = np.dtype(dtype).itemsize
    places = np.array([0, *accumulate(int(length) * width for length in lengths)][: len(lengths)], dtype="<i8")
    bounds = np.array([0, *accumulate(len(document) for document in documents)], dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(lengths), len(bounds))
    index = header + lengths.tobytes() + places.tobytes() + bounds.tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    ids = np.array([token for sequence in sequences for token in sequence], dtype=np.dtype(dtype).newbyteorder("<"))
    prefix.with_name(f"{prefix.name}.bin").write_bytes(ids.tobytes())
    return prefix


def write_datatrove(
    path: Path,
    documents: Sequence[Sequence[int]],
    tokenizer: str | None = "gpt2",
    width: int = 2,
    *,
    index: bool = True,
) -> Path:
    """datatrove, pipeline/tokens/tokenizer.py: the ids; the ends of documents; the tokenizer's name and the numbers."""
    ids = [token for document in documents for token in document]
    path.write_bytes(struct.pack(f"<{len(ids)}{'I' if width == 4 else 'H'}", *ids))
    if index:
        ends = list(accumulate(len(document) for document in documents))
        path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if tokenizer is not None:
        path.with_name(f"{path.name}.metadata").write_text(f"{tokenizer}|{width}\n{len(ids)}\n{len(ids)} T")
    return path
