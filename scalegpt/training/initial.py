"""What a run takes over from the folder that ``init_from`` names: the shape and the tokenizer; needs no torch for that.

The folder is read once. A run that began with it keeps its shape in its ``config.yaml``, so the folder may be gone when the
run resumes, and ``init_from`` need not be given again.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.presets import load_config_file
from scalegpt.config.run import TOKENIZERS
from scalegpt.errors import InputError
from scalegpt.interop.families import read_config
from scalegpt.interop.families.reading import is_hugging_face

FREE = frozenset({"block_size", "vocab_size", "dropout"})
"""Settings of the model that may differ from the folder's: other rows of the vocabulary, and no tensor or fewer rows."""

LONGEST_BLOCK = 8192
"""The block, in tokens, of a model that can read more, if no block is asked for: few cards can train with 131,072."""

TOKENIZER_JSON = "tokenizer.json"

NAMES_TOKENIZER = ("tokenizer",)
"""The settings of ``data`` that name a tokenizer."""

_SIZES = {"n_kv_head": "kv_heads", "head_size": "head_width", "n_inner": "inner_width"}
"""Setting that may be none → the size that it has then."""


@dataclass(frozen=True)
class Shape:
    """What a folder says of its model: ``model``, and the settings of ``data`` that name its tokenizer."""

    model: ModelConfig
    data: dict[str, Any]


def with_initial(
    run: RunConfig, folder: Path | None, *, given: Collection[str], stated: Collection[str]
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run with the shape and the tokenizer of the model that it starts from, if it starts from one.

    Args:
        run: the run as preset, file and flags describe it.
        folder: the run's own folder, which may hold a run that began so; None: a new run is asked for.
        given: names of the settings that flags or a file give.
        stated: names of the settings that the preset gives.

    Returns:
        The run, and lines to print.

    Raises:
        InputError: the folder holds no model that can be read, or a setting contradicts its shape.
    """
    asked = run.train.init_from
    begun = None if folder is None else _begun(folder)
    if folder is not None and begun is not None and asked in (None, begun["train"]["init_from"]):
        run = replace(run, train=run.train.changed(init_from=begun["train"]["init_from"]))
        return _with_shape(run, _recorded(begun, str(folder), folder), given, stated), ()
    if asked is None:
        return run, ()
    shape = shape_of(Path(asked))
    notes: tuple[str, ...] = ()
    longest = shape.model.block_size
    if "block_size" not in given and longest > LONGEST_BLOCK:
        shape = replace(shape, model=shape.model.changed(block_size=LONGEST_BLOCK))
        notes = (
            f"blocks of {LONGEST_BLOCK:,} tokens, of the {longest:,} that {asked} can read; --block_size sets another length",
        )
    return _with_shape(run, shape, given, stated), notes


def shape_of(path: Path) -> Shape:
    """The shape of the model in a Hugging Face folder, a run or a checkpoint.

    Raises:
        InputError: there is none of these, or its configuration cannot be read.
    """
    if is_hugging_face(path):
        model = read_config(path).model
        return Shape(model, {"tokenizer": str(path)} if (path / TOKENIZER_JSON).exists() else {})
    from scalegpt.checkpoint.reader import read_manifest  # imported here: they import torch, which takes seconds
    from scalegpt.training.runs.find import with_newest

    found, config = with_newest(path, lambda found: (found, read_manifest(found).header.config))
    return _recorded(config, str(found), found.parent.parent)


def _recorded(config: dict[str, Any], where: str, folder: Path) -> Shape:
    """The shape in the configuration of a run, in the form of a configuration file; ``folder`` is the run's.

    Raises:
        InputError: the configuration has no model, or a setting of it is not valid.
    """
    model, data = config.get("model"), config.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise InputError(f"{where} has no configuration of a model; use another")
    named = {key: data[key] for key in NAMES_TOKENIZER if key in data}
    if named.get("tokenizer") not in TOKENIZERS and (folder / TOKENIZER_JSON).is_file():
        named["tokenizer"] = str(folder)  # the run's own copy
    return Shape(ModelConfig.from_mapping(model, where), named)


def _begun(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, if it began with another model's weights; else None."""
    config = folder / "config.yaml"
    if not config.is_file():
        return None
    try:
        values = load_config_file(config)
    except InputError:  # reported where the run is opened
        return None
    return values if values.get("train", {}).get("init_from") is not None else None


def _with_shape(run: RunConfig, shape: Shape, given: Collection[str], stated: Collection[str]) -> RunConfig:
    """The run with this shape and tokenizer, except for the settings in :data:`FREE` that are given.

    Raises:
        InputError: a setting that is given or stated contradicts the shape.
    """
    theirs, ours, path = shape.model, run.model, run.train.init_from
    for key in ModelConfig.settings():
        size = _SIZES.get(key, key)
        if key in FREE or key not in {*given, *stated} or getattr(ours, size) == getattr(theirs, size):
            continue
        word = "the preset" if key not in given else f"{key} {getattr(ours, key)}"
        raise InputError(
            f"{word} contradicts init_from {path}, whose model has {key} {getattr(theirs, size)}; omit it, since the model's "
            "shape comes from there"
        )
    free = {key: getattr(ours, key) for key in FREE.intersection(given)}
    if theirs.position == "learned" and free.get("block_size", 0) > theirs.block_size:
        raise InputError(
            f"block_size {free['block_size']}: the model of init_from {path} has learned {theirs.block_size} positions; give "
            f"--block_size {theirs.block_size} or less"
        )
    data = run.data if "tokenizer" in given else run.data.changed(**shape.data)
    return replace(run, model=theirs.changed(**free), data=data)
