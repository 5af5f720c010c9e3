"""Reads the shape and the tokenizer that a run takes over from the folder that ``init_from`` names. Needs no torch.

The folder is read only when the run begins. The run's ``config.yaml`` then holds the shape, so a resume needs neither
the folder nor ``init_from``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.presets import UNNAMED, load_config_file, load_preset
from scalegpt.config.settings import coerce
from scalegpt.config.shape import RESOLVED
from scalegpt.config.tokenizer import NAMES, TOKENIZER_JSON
from scalegpt.errors import InputError
from scalegpt.interop.families import read_config
from scalegpt.interop.families.reading import is_hugging_face, tokenizer_setting
from scalegpt.planner.source import FREE, LONGEST_BLOCK
from scalegpt.text import shown

Values = dict[str, Any]

_LONGEST_NAME = 100

TOKENIZER_SETTINGS = ("tokenizer", "end_of_text")
"""The settings of the data that name a tokenizer."""


@dataclass(frozen=True)
class Initial:
    """What a folder says about its model.

    Attributes:
        path: the folder, as ``init_from`` names it.
        model: the shape.
        data: the settings of the data that name the tokenizer; empty if the folder has none.
        is_begun: whether the shape comes from the run itself, which began with this folder earlier.
    """

    path: str
    model: ModelConfig
    data: Values
    is_begun: bool = False


def with_initial(
    flags: Mapping[str, Any], *, preset: str | None, config_file: str | None, folder: Path | None
) -> tuple[Values, tuple[str, ...]]:
    """Add to the flags the shape and the tokenizer of the model that ``init_from`` names, if there is one.

    Args:
        flags: the settings that the user gives over the preset or the file.
        preset: the name of the preset.
        config_file: the path of the file.
        folder: the run's own folder, which may hold a run that began with ``init_from``; None: a new run is asked for.

    Returns:
        The flags, and lines to print.

    Raises:
        InputError: ``init_from`` names no model that can be read, or a setting contradicts its shape.
    """
    file = load_config_file(config_file) if config_file else {}
    named = flags.get("init_from", file.get("train", {}).get("init_from"))
    initial = _initial(coerce(TrainConfig.settings()["init_from"], named), folder)
    if initial is None:
        return dict(flags), ()
    stated = load_preset(preset).get("model", {}) if preset else {}
    _check("the preset", stated, initial)
    _check("config_file", file.get("model", {}), initial)
    _check("", flags, initial)
    free = {key: each[key] for each in (file.get("model", {}), flags) for key in FREE if key in each}
    longest, notes = initial.model.block_size, tuple[str, ...]()
    if "block_size" not in free and longest > LONGEST_BLOCK and not initial.is_begun:
        free["block_size"] = LONGEST_BLOCK
        line = f"blocks of {LONGEST_BLOCK:,} tokens, out of the {longest:,} that {initial.path} can read"
        notes = (f"{line}; --block_size sets another length",)
    shape = {each.name: getattr(initial.model, each.name) for each in fields(initial.model)}
    tokenizer = {} if "tokenizer" in {*flags, *file.get("data", {})} else initial.data
    return {**shape, **tokenizer, **flags, **free, "init_from": initial.path}, notes


def name_after(given: Any, runs_dir: Path) -> str | None:
    """The name of a run without a given name: the name of the folder of the model ``given``; None: no model is given.

    If the model is in ``runs_dir`` itself, the name begins with ``from-``. A run that an earlier release began under
    :data:`~scalegpt.config.presets.UNNAMED` keeps that name.
    """
    init_from = coerce(TrainConfig.settings()["init_from"], given)
    if init_from is None:
        return None
    begun = _begun(runs_dir / UNNAMED)
    if begun is not None and begun["train"]["init_from"] == init_from:
        return UNNAMED
    path = Path(init_from).resolve()
    model = path.parent.parent if path.parent.name == "checkpoints" else path
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("._-")[:_LONGEST_NAME] or UNNAMED
    return f"from-{name}" if model.parent == runs_dir.resolve() else name


def _initial(asked: str | None, folder: Path | None) -> Initial | None:
    """The model that ``init_from`` names, or with which the run in the folder began; None: random weights."""
    begun = None if folder is None else _begun(folder)
    if folder is not None and begun is not None and asked in (None, begun["train"]["init_from"]):
        model, data = _recorded(begun, str(folder), folder)
        return Initial(begun["train"]["init_from"], model, data, is_begun=True)
    return None if asked is None else Initial(asked, *shape_of(Path(asked)))


def shape_of(path: Path) -> tuple[ModelConfig, Values]:
    """The shape of the model in a Hugging Face folder, a run or a checkpoint, and the settings that name its tokenizer.

    Raises:
        InputError: the folder is none of these, or its configuration cannot be read.
    """
    if is_hugging_face(path):
        read = read_config(path)
        # A folder without one is named all the same: reading it says what is missing.
        return read.model, {"tokenizer": tokenizer_setting(read) or str(path)}
    check_exists(path)
    from scalegpt.checkpoint.reader import read_manifest  # imported here: they import torch, which takes seconds
    from scalegpt.training.runs.find import with_newest

    found, config = with_newest(path, lambda found: (found, read_manifest(found).header.config))
    is_run = (path / "config.yaml").is_file()
    return _recorded(config, str(found), path if is_run else path.absolute().parent.parent)


def check_exists(path: Path) -> None:
    """Refuse a value of ``init_from`` that is not an existing path.

    Raises:
        InputError: there is no such path.
    """
    if not path.exists():
        if str(path).partition(":/")[1]:
            raise InputError(
                f"init_from takes no address: copy the checkpoint of {path} to a disk, and give its folder"
            )
        raise InputError(
            f"init_from {path} does not exist; give a Hugging Face folder (nothing is downloaded), a run or a checkpoint"
        )


def _recorded(config: Values, where: str, folder: Path) -> tuple[ModelConfig, Values]:
    """The shape and the tokenizer in the configuration of a run, whose folder is ``folder``.

    Raises:
        InputError: the configuration has no model, or a setting of it is not valid.
    """
    model, data = config.get("model"), config.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise InputError(f"{where} has no configuration of a model; use another")
    named = {key: data[key] for key in TOKENIZER_SETTINGS if key in data}
    if named.get("tokenizer") not in NAMES and (folder / TOKENIZER_JSON).is_file():
        named["tokenizer"] = str(folder)  # the run's own copy
    return ModelConfig.from_mapping(model, where), named


def _begun(folder: Path) -> Values | None:
    """The configuration of the run in a folder, if it began with another model's weights; else None."""
    config = folder / "config.yaml"
    if not config.is_file():
        return None
    try:
        values = load_config_file(config)
    except InputError:  # reported where the run is opened
        return None
    return values if values.get("train", {}).get("init_from") is not None else None


def _check(where: str, values: Mapping[str, Any], initial: Initial) -> None:
    """Refuse settings that contradict the shape of the model from which the run starts.

    Raises:
        InputError: a setting differs from the model's, or asks for more positions than the model has learned.
    """
    known = ModelConfig.settings()
    for key in _model_keys(values):
        value, size = coerce(known[key], values[key]), RESOLVED.get(key, key)
        theirs = getattr(initial.model, size)
        try:
            is_same = getattr(initial.model.changed(**{key: value}), size) == theirs
        except InputError:  # a value that does not go together with the others is another one
            is_same = False
        if not is_same:
            word = f"{where}, with {key} {shown(value)}," if where else f"{key} {shown(value)}"
            raise InputError(
                f"{word} contradicts init_from {initial.path}, whose model has {key} {theirs}; omit it, since the shape "
                "comes from there"
            )
    wanted = values.get("block_size") if where != "the preset" else None
    if wanted is not None and initial.model.position == "learned" and not initial.is_begun:
        longest = initial.model.block_size
        if coerce(known["block_size"], wanted) > longest:
            raise InputError(
                f"block_size {shown(wanted)}: the model of init_from {initial.path} has learned {longest} positions; give "
                f"--block_size {longest} or less"
            )


def _model_keys(values: Mapping[str, Any]) -> Iterable[str]:
    return [key for key in values if key in ModelConfig.settings() and key not in FREE]
