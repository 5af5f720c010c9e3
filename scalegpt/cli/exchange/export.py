"""``scalegpt export``: write a trained model for other programs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.checkpoint.address import place_of
from scalegpt.cli.output import show, show_json
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument
from scalegpt.config.inference import LAST
from scalegpt.config.settings import Section, setting
from scalegpt.errors import InputError
from scalegpt.text import shown
from scalegpt.units import format_bytes

EXAMPLE = """\
scalegpt export runs/tiny --to hf --out tiny-hf
scalegpt export runs/tiny --to hf --out tiny-hf --dtype bf16 --checkpoint best
scalegpt export runs/tiny --to gguf --out tiny.gguf
scalegpt export runs/tiny --to safetensors --out tiny.safetensors"""

SUMMARY = """\
Write a trained model for other programs. No GPU is needed.

hf           a folder for transformers, vLLM and lm-evaluation-harness; logits are compared if transformers is installed
gguf         a file for llama.cpp; needs the package gguf
safetensors  all weights in one file, under ScaleGPT's own names"""

ENDINGS = {
    "llama.cpp's format": ".gguf .ggml",
    "a pickle": ".bin .pt .pth .ckpt .pkl .pickle",
    "ONNX": ".onnx",
    "TensorFlow Lite": ".tflite",
    "HDF5": ".h5 .hdf5",
    "Keras": ".keras",
    "a format of NumPy": ".npz .npy",
    "Flax's msgpack": ".msgpack",
    "Core ML": ".mlmodel",
    "a ZIP archive": ".zip",
    "JSON": ".json",
    "safetensors": ".safetensors",
}
"""File format → the file name endings that stand for it."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Section):
    """The settings of ``scalegpt export``."""

    to: str = setting("hf", "the format", choices=("hf", "gguf", "safetensors"))
    dtype: str = setting("fp32", "dtype of the weights; bf16 rounds to nearest", choices=("fp32", "bf16"))
    checkpoint: str = setting(LAST, "a step; best: the lowest held-out loss; last: the newest")
    max_shard_size: str = setting("5GB", "hf: the largest size of a file of weights, for example 500MB or 2GiB")


def main(argv: Sequence[str]) -> int:
    """Export the model that the arguments name."""
    arguments = _parser().parse(argv)
    given = given_settings(arguments, ExportSettings)
    settings = ExportSettings.from_mapping(given, "command line")
    if "to" not in given:
        raise InputError("--to is required: hf, gguf or safetensors")
    out = Path(arguments.out)
    check_ending(out, settings.to)
    size = _bytes(settings.max_shard_size)

    from scalegpt.inference.export import export

    written = export(
        place_of(arguments.run),
        settings.to,
        out,
        dtype=settings.dtype,
        checkpoint=settings.checkpoint,
        max_shard_bytes=size,
    )
    facts: dict[str, Any] = {
        "checkpoint": str(written.checkpoint), "out": arguments.out, "format": written.format, "dtype": written.dtype,
        "family": written.family, "bytes": written.bytes, "sha256": written.sha256, "notes": list(written.notes),
    }  # fmt: skip
    if arguments.json:
        show_json(facts)
        return 0
    family = "" if written.family is None else f" as {written.family}"
    show(f"{out}: {written.dtype} weights of {written.checkpoint}{family}, {format_bytes(written.bytes)}")
    for line in written.notes:
        show(line)
    return 0


def _parser() -> Parser:
    parser = Parser("export", SUMMARY, EXAMPLE)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="PATH", help="the folder (hf) or the file to make"
    )
    add_json(parser)
    add_settings(parser, "export", ExportSettings)
    return parser


def check_ending(out: Path, to: str) -> None:
    """Refuse an output file whose ending stands for another format, for example ``.pt``.

    Raises:
        InputError: the ending stands for another format; the message proposes another name for ``--out``.
    """
    right = {"hf": "", "gguf": ".gguf", "safetensors": ".safetensors"}[to]
    for meaning, endings in ENDINGS.items():
        if out.suffix.lower() in endings.split() and out.suffix.lower() != right:
            instead = out.with_suffix(right)
            raise InputError(
                f"out {out}: {out.suffix} means {meaning}, but --to {to} writes {_what(to)}; use --out {instead}"
            )


def _what(to: str) -> str:
    return {"hf": "a folder", "gguf": "GGUF", "safetensors": "safetensors, which converters for other formats read"}[to]


def _bytes(text: str) -> int:
    """Read a size (``5GB``, ``500MB`` or ``2GiB``) as a number of bytes.

    Raises:
        InputError: the text is not a size, or is 0.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,3})?)\s*([kmg]?i?b)?", text.strip().lower())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 0)) if match else 0
    if size < 1:
        raise InputError(f"max_shard_size must be a size such as 5GB, 500MB or 2GiB, not {shown(text)}")
    return size
