"""Writes a trained model for other programs: a Hugging Face folder, a GGUF file, or one plain safetensors file."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.inspection import convert
from scalegpt.config.inference import LAST
from scalegpt.errors import InputError
from scalegpt.export.compare import compare
from scalegpt.export.gguf import write_gguf
from scalegpt.export.huggingface import Folder
from scalegpt.export.place import new_folder
from scalegpt.export.source import Source
from scalegpt.interop.families.reading import is_hugging_face
from scalegpt.training.runs.find import chosen_checkpoint, open_weights, with_newest

HF, GGUF, SAFETENSORS = "hf", "gguf", "safetensors"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        checkpoint: the checkpoint that was exported.
        out: the folder or the file.
        format: ``hf``, ``gguf`` or ``safetensors``.
        dtype: the dtype of the weights.
        family: the class in transformers, or the architecture in ``llama.cpp``; None for ``safetensors``.
        bytes: the size of the weights.
        sha256: the digest of the file; None for a folder.
        notes: remarks, a line each: the result of comparing the logits, and what the other program does differently.
    """

    checkpoint: Place
    out: Path
    format: str
    dtype: str
    family: str | None
    bytes: int
    sha256: str | None = None
    notes: tuple[str, ...] = ()


def export(
    path: Place, to: str, out: Path, *, dtype: str = "fp32", checkpoint: str = LAST, max_shard_bytes: int = 5 * 10**9
) -> Exported:
    """Write the weights of a run for other programs. If this fails, no file is left.

    Args:
        path: a run's folder, or a checkpoint's folder.
        to: ``hf``: a folder for transformers, whose logits are compared with ours if transformers is installed; ``gguf``: a
            file for llama.cpp; ``safetensors``: one file of all weights under our own names.
        out: the folder or the file to make.
        dtype: ``fp32`` or ``bf16``.
        checkpoint: which checkpoint of a run: ``last``, ``best`` or a step.
        max_shard_bytes: the largest file of weights in a folder.

    Raises:
        InputError: there is no such checkpoint, or it is damaged; the format has no model of this shape, or no such
            tokenizer; ``out`` exists, or cannot be written.
        RunError: transformers computes other logits.
    """
    if isinstance(path, Path) and is_hugging_face(path):
        raise InputError(
            f"{path} is a Hugging Face folder, but export takes a run; make one: "
            f"scalegpt import {shlex.quote(str(path))} --model_name NAME"
        )

    def write(found: Place) -> Exported:
        stored = open_weights(found)
        if to == SAFETENSORS:
            written = convert(stored, out, dtype)
            return Exported(found, out, to, dtype, None, written.bytes, written.sha256)
        source = Source.of(stored, dtype)
        return _WRITERS[to](source, out, max_shard_bytes)

    return with_newest(chosen_checkpoint(path, checkpoint), write)


def _folder(source: Source, out: Path, max_shard_bytes: int) -> Exported:
    folder = Folder.of(source, max_shard_bytes)
    with new_folder(out) as place:
        folder.write(place)
        note = compare(source, place)
    notes = (note, *source.notes)
    return Exported(source.checkpoint.path, out, HF, source.dtype, folder.family, folder.bytes, notes=notes)


def _gguf(source: Source, out: Path, _max_shard_bytes: int) -> Exported:
    written = write_gguf(source, out)
    notes = (*written.notes, *source.notes)
    return Exported(source.checkpoint.path, out, GGUF, source.dtype, written.family, written.bytes, notes=notes)


_WRITERS: dict[str, Callable[[Source, Path, int], Exported]] = {HF: _folder, GGUF: _gguf}
