"""Writes a model as a Hugging Face folder: configuration, weights in safetensors, tokenizer and model card.

transformers, vLLM, lm-evaluation-harness and the converters of other programs read such a folder. Tensors are read and
written one at a time. Neither a GPU nor transformers is needed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.checkpoint.inspection import DTYPES
from scalegpt.checkpoint.tensorfile import Entry, write_tensors
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.export.card import model_card
from scalegpt.export.source import Source
from scalegpt.interop.families import FAMILIES, as_config
from scalegpt.interop.families.reading import CONFIG
from scalegpt.storage import check_space
from scalegpt.weights.files import INDEX, SAFETENSORS
from scalegpt.weights.layouts import Target, targets, to_theirs
from scalegpt.weights.table import HUGGING_FACE
from scalegpt.weights.taken_over import GENERATION

NAMES = {"fp32": "float32", "bf16": "bfloat16"}
"""Dtype → its name in ``config.json``."""


@dataclass(frozen=True)
class Folder:
    """A folder to be written, with all decisions that are made before the first byte.

    Attributes:
        source: the model.
        config: the content of ``config.json``.
        shards: file → the tensors that it will hold, in order.
    """

    source: Source
    config: dict[str, Any]
    shards: dict[str, list[Target]]

    @classmethod
    def of(cls, source: Source, max_shard_bytes: int) -> "Folder":
        """Choose the family, and divide the weights into files.

        Args:
            source: the model.
            max_shard_bytes: the largest file of weights; a larger tensor has a file of its own.

        Raises:
            InputError: no family has this shape; the message says which settings the nearest needs.
        """
        config = as_config(source.model)
        wanted = targets(source.model, HUGGING_FACE[config["model_type"]])
        if source.positions > source.model.block_size:
            config[FAMILIES[config["model_type"]].keys["block_size"]] = source.positions
        config |= {**source.special_ids(), "torch_dtype": NAMES[source.dtype]}
        shards = _divided([_entry(target, source) for target in wanted], max_shard_bytes)
        named, start = {}, 0
        for number, entries in enumerate(shards, 1):
            stem, suffix = SAFETENSORS.split(".")
            name = SAFETENSORS if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
            named[name] = wanted[start : start + len(entries)]
            start += len(entries)
        return cls(source, config, named)

    @property
    def family(self) -> str:
        """The name of the class in transformers."""
        return str(self.config["architectures"][0])

    @property
    def bytes(self) -> int:
        """The size of all weights."""
        return sum(_entry(target, self.source).bytes for targets in self.shards.values() for target in targets)

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder.

        Raises:
            InputError: the disk has no room, or a file of the checkpoint cannot be read.
            OSError: the folder cannot be written.
        """
        source = self.source
        check_space(folder, self.bytes)
        for name, wanted in self.shards.items():
            values = (
                value.to(DTYPES[source.dtype]).contiguous() for value in to_theirs(source.read, wanted, source.model)
            )
            write_tensors(folder / name, [_entry(target, source) for target in wanted], values, {"format": "pt"})
        if len(self.shards) > 1:
            places = {target.name: name for name, wanted in self.shards.items() for target in wanted}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
            _write_json(folder / f"{SAFETENSORS}{INDEX}", index)
        _write_json(folder / CONFIG, self.config)
        _write_json(folder / GENERATION, source.generation_config())
        for name, content in tokenizer_files(source.tokenizer).items():
            (folder / name).write_bytes(content)
        (folder / "README.md").write_text(model_card(source, self.family), encoding="utf-8")


def _entry(target: Target, source: Source) -> Entry:
    return Entry(target.name, DTYPES[source.dtype], target.shape)


def _divided(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Divide tensors in order into files of at most ``most`` bytes; a larger tensor has a file of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    return shards


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
