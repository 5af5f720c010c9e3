"""Presets and configuration files, and how flags override them.

A configuration file, JSON or YAML, has this form; every part may be left out::

    {"description": "…", "name": "…",
     "model": {ModelConfig}, "train": {TrainConfig}, "data": {DataConfig},
     "backend": "fsdp", "zero_stage": 2, "offload": "none", "ds_config": null}

A preset is such a file in ``configs/``. A run's own ``config.yaml`` has the same form, so that
``--config_file runs/NAME/config.yaml`` repeats a run.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from scalegpt.config.run import AUTO, PLANNED, SECTIONS, ParallelConfig, RunConfig
from scalegpt.config.train import LENGTHS
from scalegpt.errors import InputError, nearest

_PARTS = ("model", "train", "data")
_LABELS = ("description", "name", "preset")

Values = dict[str, Any]


@cache
def bundled(folder: str) -> Path:
    """The folder of presets (``configs``) or DeepSpeed files (``ds_configs``): the wheel's copy or the repository's."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_bundled" / folder
    return installed if installed.is_dir() else package.parent / folder


@cache
def preset_names() -> tuple[str, ...]:
    """The names of all presets, in alphabetical order."""
    return tuple(sorted(path.stem for path in bundled("configs").glob("*.json")))


def load_preset(name: str) -> Values:
    """The parsed file of a preset.

    Raises:
        InputError: no such preset; the message offers the nearest.
    """
    if name not in preset_names():
        raise InputError(f"preset {name!r} does not exist{nearest(name, preset_names())}")
    return {**load_config_file(bundled("configs") / f"{name}.json"), "preset": name}


def load_config_file(path: str | Path) -> Values:
    """Parse a configuration file and check the names of its parts.

    Raises:
        InputError: the file is missing, is not JSON or YAML, or has an unknown part.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config_file {path}: {error.strerror}; give a JSON or YAML file, or --preset NAME") from None
    except UnicodeDecodeError:
        raise InputError(f"config_file {path} is not a text file; give a JSON or YAML file") from None
    values = _parse(text, path)
    if not isinstance(values, dict):
        raise InputError(f"config_file {path} must hold an object with the parts {', '.join(_PARTS)}")
    known = {*_PARTS, *_LABELS, *ParallelConfig.settings()}
    for key, value in values.items():
        if key not in known:
            hint = _home(key) or nearest(key, known | _setting_names())
            raise InputError(f"{path}: unknown key {key!r}{hint}")
        if key in _PARTS and not isinstance(value, dict):
            raise InputError(f"{path}: {key} must be an object of settings, not {value!r}")
    return values


def _parse(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    import yaml  # 20 ms that most commands need not pay

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not YAML: {reason}") from None


def _setting_names() -> set[str]:
    return {key for section in SECTIONS.values() for key in section.settings()}


def _home(key: str) -> str:
    """Where a setting belongs that stands at the top of a file by mistake."""
    homes = [part for part in _PARTS if key in SECTIONS[part].settings()]
    return f": {key} belongs under {homes[0]!r}" if homes else ""


def resolve(
    *, preset: str | None = None, config_file: str | None = None, flags: Values | None = None, name: str | None = None
) -> RunConfig:
    """The configuration that a preset or file and the flags over it describe.

    Args:
        preset: name of a preset; not together with ``config_file``. With neither, the settings' own defaults hold.
        config_file: path of a JSON or YAML file.
        flags: setting → value for any setting of any section; they win over the file's. Those of
            :data:`~scalegpt.config.run.PLANNED` may be ``auto``, in a file too.
        name: the run's name; by default the file's, or the preset's.

    Raises:
        InputError: an unknown name or key, a bad value, or settings that do not go together.
    """
    flags, auto = _without_auto(flags or {})
    if preset is not None and config_file is not None:
        raise InputError(f"give --preset {preset} or --config_file {config_file}, not both")
    base: Values = {}
    if preset is not None:
        base = load_preset(preset)
    elif config_file is not None:
        base = load_config_file(config_file)
    where = f"preset {preset}" if preset else str(config_file or "command line")
    file_values = {part: dict(base.get(part, {})) for part in _PARTS}
    file_values["parallel"] = {key: base[key] for key in ParallelConfig.settings() if key in base}
    for part, values in file_values.items():
        file_values[part], open_there = _without_auto(values)
        auto |= open_there - flags.keys()
    _drop_overridden_layout(file_values["parallel"], flags)
    file_values["train"], flags = _replace_lengths(file_values["train"], flags)
    sections = {}
    for part, section in SECTIONS.items():
        over = {key: flags.pop(key) for key in list(flags) if key in section.settings()}
        section.from_mapping(
            _with_vocab_word(file_values[part]), where
        )  # a mistake in the file is the file's, whatever the flags say
        sections[part] = section.from_mapping(
            _with_vocab_word({**file_values[part], **over}), "command line" if over else where
        )
    if flags:
        key = next(iter(flags))
        raise InputError(f"unknown setting {key!r}{nearest(key, _setting_names())}")
    label = name or base.get("name") or preset or (Path(config_file).stem if config_file else "custom")
    return RunConfig(name=label, preset=base.get("preset"), auto=auto, **sections)  # type: ignore[arg-type]


def _without_auto(values: Values) -> tuple[Values, frozenset[str]]:
    """The values that are set, and the names of those that the planner is to choose."""
    auto = frozenset(key for key, value in values.items() if key in PLANNED and value == AUTO)
    return {key: value for key, value in values.items() if key not in auto}, auto


def _with_vocab_word(values: Values) -> Values:
    """``vocab_size: auto`` is written 0 inside: the tokenizer decides."""
    return {**values, "vocab_size": 0} if values.get("vocab_size") == "auto" else values


def _drop_overridden_layout(layout: Values, flags: Values) -> None:
    """Forget the file's stage and DeepSpeed file where a flag changes what they were written for."""
    if flags.get("backend", layout.get("backend")) != layout.get("backend"):
        for key in ("zero_stage", "ds_config", "offload"):
            layout.pop(key, None)
    if "zero_stage" in flags or "offload" in flags:
        layout.pop("ds_config", None)


def _replace_lengths(file: Values, flags: Values) -> tuple[Values, Values]:
    """The file's values and the flags; a given length replaces the other length of the level below.

    A flag replaces what the file says, and the file replaces the default: ``max_tokens`` alone is not cut short by a
    ``max_iters`` that nobody gave. Two lengths of the same level both stay.
    """
    neither = dict.fromkeys(LENGTHS)
    if _gives_length(flags):
        return file, {**neither, **flags}
    return ({**neither, **file}, flags) if _gives_length(file) else (file, flags)


def _gives_length(values: Values) -> bool:
    return any(str(values.get(key)).lower() not in {"none", "null"} for key in LENGTHS)


def named_settings(preset: str | None = None, config_file: str | Path | None = None) -> frozenset[str]:
    """The settings that a preset or a configuration file names; none of neither.

    Raises:
        InputError: no such preset, or a file that is no configuration.
    """
    values = {} if config_file is None else load_config_file(config_file)
    values = values if preset is None else load_preset(preset)
    return frozenset(key for part in values.values() if isinstance(part, dict) for key in part)


def as_file(run: RunConfig) -> Values:
    """The run in the form of a configuration file: what ``resolve`` reads back."""
    values = run.as_dict()
    parallel = values.pop("parallel")
    return {"name": values.pop("name"), "preset": values.pop("preset"), **values, **parallel}
