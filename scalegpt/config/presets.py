"""Presets and configuration files, and how flags override them.

A configuration file, JSON or YAML, has this form; every part is optional::

    {"description": "…", "name": "…",
     "model": {ModelConfig}, "train": {TrainConfig}, "data": {DataConfig},
     "backend": "fsdp", "zero_stage": 2, "offload": "none", "ds_config": null}

A preset is such a file in ``configs/``, or in ``configs/public/`` if it is a public model. A run's own ``config.yaml`` has
the same form, so that ``--config_file runs/NAME/config.yaml`` repeats a run.
"""

from functools import cache
from pathlib import Path
from typing import Any

from scalegpt.config.aliases import hint
from scalegpt.config.run import AUTO, PLANNED, SECTIONS, ParallelConfig, RunConfig
from scalegpt.config.settings import coerce
from scalegpt.config.train import LENGTHS
from scalegpt.errors import InputError, nearest
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, parse_json, parse_yaml
from scalegpt.text import shown

_PARTS = ("model", "train", "data")
_LABELS = ("description", "name", "preset")
_LONGEST_LABEL = 1000

Values = dict[str, Any]


@cache
def bundled(folder: str) -> Path:
    """The path of ``configs`` (presets) or ``ds_configs`` (DeepSpeed files), in the installed wheel or repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_bundled" / folder
    return installed if installed.is_dir() else package.parent / folder


@cache
def _preset_files(folder: str) -> dict[str, Path]:
    """Name → file, of the presets in ``configs/`` (``folder`` is ``.``) or in a folder there; in alphabetical order."""
    return {path.stem: path for path in sorted((bundled("configs") / folder).glob("*.json"))}


UNNAMED = "custom"
"""The name of a run without a name, a preset or a configuration file."""


def preset_names() -> tuple[str, ...]:
    """The names of ScaleGPT's own presets, in alphabetical order."""
    return tuple(_preset_files("."))


def public_names() -> tuple[str, ...]:
    """The names of the presets that are public models, in alphabetical order."""
    return tuple(_preset_files("public"))


def load_preset(name: str) -> Values:
    """The parsed file of a preset, ScaleGPT's own or a public model, with the preset's name under ``preset``.

    Raises:
        InputError: there is no such preset; the message names the nearest.
    """
    files = _preset_files(".") | _preset_files("public")
    if name not in files:
        raise InputError(f"preset {shown(name)} does not exist{nearest(name, files, 'scalegpt presets')}")
    return {**load_config_file(files[name]), "preset": name}


def load_config_file(path: str | Path) -> Values:
    """Parse a configuration file, and check the names of its parts and settings.

    Raises:
        InputError: the file is missing, is not JSON or YAML, or has an unknown part or setting.
    """
    path = Path(path)
    try:
        text = read_text(path, CONFIG_LIMIT)
    except OSError as error:
        raise InputError(f"config_file {path}: {error.strerror}; give a JSON or YAML file, or --preset NAME") from None
    except UnicodeDecodeError:
        raise InputError(f"config_file {path} is not a text file; give a JSON or YAML file") from None
    values = parse_json(text, str(path)) if path.suffix.lower() == ".json" else parse_yaml(text, str(path))
    return checked(values, str(path))


def checked(values: Any, where: str) -> Values:
    """Check the names of parts and settings in a parsed file; return its values, with name, preset, description as text.

    ``where`` names the file in error messages. :func:`resolve` checks the values of the settings.

    Raises:
        InputError: the file is not an object, or has an unknown part or setting.
    """
    if not isinstance(values, dict):
        raise InputError(f"config_file {where} must hold an object with the parts {', '.join(_PARTS)}")
    known = {*_PARTS, *_LABELS, *ParallelConfig.settings()}
    names = known | _setting_names()
    unknown = [key for key in values if key not in known]
    # A file that is not a configuration may hold a secret, so the message does not quote it.
    if (
        unknown
        and values.keys().isdisjoint(known)
        and not any("did you mean" in nearest(key, names) for key in unknown)
    ):
        parts = ", ".join(_PARTS)
        raise InputError(
            f"config_file {where} is not a configuration: it has neither a part ({parts}) nor a layout setting"
        )
    if unknown:
        raise InputError(f"{where}: unknown key {shown(unknown[0])}{_home(unknown[0]) or hint(unknown[0], names)}")
    for part in [each for each in _PARTS if each in values]:
        if not isinstance(values[part], dict):
            raise InputError(f"{where}: {part} must be an object of settings, not {shown(values[part])}")
        for key in values[part]:
            if key not in SECTIONS[part].settings():
                known_here = _home(key) or hint(key, _setting_names())
                raise InputError(f"{where}: {part}: unknown key {shown(key)}{known_here}")
    return {**values, **{key: _label(values[key], key, where) for key in _LABELS if key in values}}


def _label(value: Any, key: str, where: str) -> str | None:
    """A name or description as text; None stays None, and a whole number is allowed as a name.

    Raises:
        InputError: the value has another type, or is very long.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{where}: {key} must be a word, not {shown(value)}")
    text = str(value)
    if len(text) > _LONGEST_LABEL:
        raise InputError(f"{where}: {key} has more than {_LONGEST_LABEL:,} characters")
    return text


@cache
def _setting_names() -> frozenset[str]:
    return frozenset(key for section in SECTIONS.values() for key in section.settings())


def _home(key: str) -> str:
    """A hint that names the part of a file in which a setting belongs; empty if it belongs in none."""
    part = next((part for part in _PARTS if key in SECTIONS[part].settings()), None)
    return "" if part is None else f": {key} belongs under {part!r}"


def resolve(
    *,
    preset: str | None = None,
    config_file: str | None = None,
    base: Values | None = None,
    flags: Values | None = None,
    name: str | None = None,
    given_in: str = "command line",
) -> RunConfig:
    """The configuration of a preset, of a file, or of parsed values, overridden by the flags.

    Args:
        preset: name of a preset. At most one of ``preset``, ``config_file`` and ``base`` is given; without any, the
            defaults apply.
        config_file: path of a JSON or YAML file.
        base: the values of a configuration file, already checked.
        flags: setting → value, of any section; the flags override the file. The settings in
            :data:`~scalegpt.config.run.PLANNED` may be ``auto``, in the flags and in the file.
        name: the run's name; by default the name in the file, or the preset's name.
        given_in: the source of the flags, for error messages.

    Raises:
        InputError: a name or key is unknown, a value is not valid, or settings contradict each other.
    """
    if preset is not None and config_file is not None:
        raise InputError(f"give --preset {preset} or --config_file {config_file}, not both")
    if preset is not None:
        base = load_preset(preset)
    elif config_file is not None:
        base = load_config_file(config_file)
    base = base or {}
    where = f"preset {preset}" if preset else str(config_file or given_in)
    flags, auto = _without_auto(flags or {})
    file, auto_in_file = _without_auto(_flat(base))
    auto |= auto_in_file - flags.keys()
    if unknown := [key for key in flags if key not in _setting_names()]:
        raise InputError(f"unknown setting {shown(unknown[0])}{hint(unknown[0], _setting_names())}")
    file, flags = _replace_lengths(_without_overridden_layout(file, flags), flags)
    sections = {}
    for part, section in SECTIONS.items():
        below, over = ({key: given[key] for key in section.settings() if key in given} for given in (file, flags))
        # The file's values are also checked alone, so that an error in the file is reported as the file's.
        section.from_mapping(_with_vocab_word(below), where)
        sections[part] = section.from_mapping(_with_vocab_word({**below, **over}), given_in if over else where)
    label = name or base.get("name") or preset or (Path(config_file).stem if config_file else UNNAMED)
    return RunConfig(name=label, preset=base.get("preset"), auto=auto, **sections)  # type: ignore[arg-type]


def _flat(values: Values) -> Values:
    """Setting → value, of all parts of a configuration file."""
    layout = {key: values[key] for key in ParallelConfig.settings() if key in values}
    return layout | {key: value for part in _PARTS for key, value in values.get(part, {}).items()}


def _without_auto(values: Values) -> tuple[Values, frozenset[str]]:
    """The values without those that are ``auto``, and the names of the settings that are ``auto``."""
    auto = frozenset(key for key, value in values.items() if key in PLANNED and value == AUTO)
    return {key: value for key, value in values.items() if key not in auto}, auto


def _with_vocab_word(values: Values) -> Values:
    """The values, with ``vocab_size: auto`` replaced by 0, which means the tokenizer's vocabulary size."""
    return {**values, "vocab_size": 0} if values.get("vocab_size") == "auto" else values


def _without_overridden_layout(file: Values, flags: Values) -> Values:
    """The file's values without the layout settings that the flags make invalid.

    A flag for the stage or the offload drops the DeepSpeed file. A flag for another backend also drops the
    stage, the offload and the shard size.
    """
    dropped = {"ds_config"} if flags.keys() & {"zero_stage", "offload"} else set()
    if "backend" in flags and flags["backend"] != file.get("backend"):
        dropped = {"zero_stage", "ds_config", "offload", "shard_size"}
    return {key: value for key, value in file.items() if key not in dropped}


def _replace_lengths(file: Values, flags: Values) -> tuple[Values, Values]:
    """Unset the lengths (:data:`LENGTHS`) that a higher level overrides; return the file's values and the flags.

    The levels from the top are flags, file, defaults. A level that sets one length unsets both lengths of the levels
    below: if only ``max_tokens`` is given, the default of ``max_iters`` does not apply.
    """
    neither = dict.fromkeys(LENGTHS)
    if _gives_length(flags):
        return file, {**neither, **flags}
    return ({**neither, **file}, flags) if _gives_length(file) else (file, flags)


def _gives_length(values: Values) -> bool:
    return any(str(values.get(key)).lower() not in {"none", "null"} for key in LENGTHS)


def named_settings(preset: str | None = None, config_file: str | Path | None = None) -> frozenset[str]:
    """The names of the settings, including the layout's, that a preset or a file sets; empty if neither is given.

    Raises:
        InputError: there is no such preset, or the file is not a configuration.
    """
    values = {} if config_file is None else load_config_file(config_file)
    return frozenset(_flat(values if preset is None else load_preset(preset)))


def as_file(run: RunConfig) -> Values:
    """The run in the form of a configuration file, which :func:`resolve` reads."""
    values = run.as_dict()
    parallel = values.pop("parallel")
    return {"name": values.pop("name"), "preset": values.pop("preset"), **values, **parallel}


def from_run(values: Any, where: str) -> Values:
    """The configuration that a run or a checkpoint recorded, with every setting converted to its type.

    Args:
        values: the parsed ``config.yaml``, or the configuration in a checkpoint.
        where: the source's name in error messages.

    Raises:
        InputError: the values are not a configuration, or a value has the wrong type.
    """
    values = checked(values, where)
    parts = {part: _typed(part, values.get(part, {}), where) for part in _PARTS}
    layout = {key: values[key] for key in ParallelConfig.settings() if key in values}
    return {**values, **parts, **_typed("parallel", layout, where)}


def _typed(part: str, values: Values, where: str) -> Values:
    known = SECTIONS[part].settings()
    try:
        return {key: coerce(known[key], value) if key in known else value for key, value in values.items()}
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
